"""The source text of the Python standard library as a TFDS dataset.

Importing this module imports TFDS, so `sources` imports it only to write the dataset.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from sct_jax import files


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Every .py file of the running Python's standard library, byte for byte.

    The version does not identify the text, which depends on the Python: use one
    `data_dir` per list of files. Written as ArrayRecord, which TFDS reads without
    TensorFlow.

    Args:
      root: folder of the standard library.
      paths: of files below `root`, per split.
      **kwargs: for TFDS.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, root: str, paths: Mapping[str, Sequence[str]], **kwargs: Any
    ) -> None:
        self._root = root
        self._paths = paths
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The source text of the Python standard library.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        return {
            split: self._generate_examples(paths)
            for split, paths in self._paths.items()
        }

    def _generate_examples(self, paths: Sequence[str]) -> Iterator[tuple[str, dict]]:
        for path in paths:
            try:
                with files.open_regular(os.path.join(self._root, path)) as file:
                    text = file.read()
            except OSError:
                continue  # the reader misses the path and counts it
            yield path, {"path": path, "text": text}
