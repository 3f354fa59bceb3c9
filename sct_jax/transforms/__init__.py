"""optax transformations for trees that hold factor tuples beside other arrays.

Each transformation treats a factor tuple as one weight and, unless it says otherwise,
passes every other leaf through unchanged. Adam (`scale_by_adam`) treats all leaves
alike. They compose with `optax.chain`, `optax.masked` and `optax.partition`. Pass
`params` to `update`. Never split the u, s and v of one weight over two partitions:
`init` raises ValueError.
"""

from sct_jax.transforms._clipping import clip_by_composite_spectral_norm
from sct_jax.transforms._common import (
    CountState,
    ScalarOrSchedule,
    check_number,
    check_whole,
)
from sct_jax.transforms._inactive import (
    ActiveColumns,
    FreezeInactiveColumnsState,
    freeze_inactive_columns,
)
from sct_jax.transforms._low_precision import (
    round_stochastically,
    scale_by_adam,
    scale_by_low_precision_adam,
)
from sct_jax.transforms._moments import (
    is_second_moment,
    key_names,
    map_first_moments,
    map_mirrors,
)
from sct_jax.transforms._retraction import project_to_tangent, retract_to_stiefel
from sct_jax.transforms._scaling import limit_rotation, scale_components
from sct_jax.transforms._spectron import PowerVectors, SpectronState, scale_by_spectron
from sct_jax.transforms._stiefel_muon import (
    COORDINATES,
    SecondMoment,
    StiefelMuonState,
    scale_by_stiefel_muon,
)
from sct_jax.transforms._transport import retract_by_svd, transport_moments

__all__ = [
    "COORDINATES",
    "ActiveColumns",
    "CountState",
    "FreezeInactiveColumnsState",
    "PowerVectors",
    "ScalarOrSchedule",
    "SecondMoment",
    "SpectronState",
    "StiefelMuonState",
    "check_number",
    "check_whole",
    "clip_by_composite_spectral_norm",
    "freeze_inactive_columns",
    "is_second_moment",
    "key_names",
    "limit_rotation",
    "map_first_moments",
    "map_mirrors",
    "project_to_tangent",
    "retract_by_svd",
    "retract_to_stiefel",
    "round_stochastically",
    "scale_by_adam",
    "scale_by_low_precision_adam",
    "scale_by_spectron",
    "scale_by_stiefel_muon",
    "scale_components",
    "transport_moments",
]
