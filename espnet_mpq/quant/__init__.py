"""Pure functions from float weights to grids, scales and codes; imports nothing but errors."""

from espnet_mpq.quant.fake_quant import (
    ClusterProjection,
    project_cluster,
    project_model_tied,
    straight_through,
)
from espnet_mpq.quant.grid import GRIDS, Grid, make_grid
from espnet_mpq.quant.projection import Projection, project, relative_error
from espnet_mpq.quant.scale import TYINGS, Blocks, scale_shapes, to_blocks

__all__ = [
    "GRIDS",
    "TYINGS",
    "Blocks",
    "ClusterProjection",
    "Grid",
    "Projection",
    "make_grid",
    "project",
    "project_cluster",
    "project_model_tied",
    "relative_error",
    "scale_shapes",
    "straight_through",
    "to_blocks",
]
