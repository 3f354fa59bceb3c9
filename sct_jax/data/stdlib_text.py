"""The Python standard library's own source text as a TFDS dataset.

Importing this module imports TFDS; `sources` does so only when no cache answers.
"""

import os
from collections.abc import Iterator

import tensorflow_datasets as tfds

from sct_jax.data import sources


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Every .py file of the running Python's standard library, byte for byte.

    Written as ArrayRecord, since that is what TFDS reads without TensorFlow. The
    version says nothing about the text, which is whatever this Python ships: keep one
    `data_dir` per list of files.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python standard library's own source text.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in sources.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        root = sources.stdlib_root()
        for path in sources.stdlib_files(root):
            if sources.split_of(path) != split:
                continue
            try:
                with open(os.path.join(root, path), "rb") as file:
                    text = file.read()
            except OSError:
                continue  # The reader misses the path and counts it.
            yield path, {"path": path, "text": text}
