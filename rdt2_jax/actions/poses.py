"""Rigid transforms: 4x4 matrices, their short forms, changes of frame, and sequences of poses.

A matrix `pose_a_b` is the pose of frame b expressed in frame a: it maps coordinates in b to coordinates in a, and
`compose(pose_a_b, pose_b_c)` is `pose_a_c`. Positions are in metres, angles in radians. Short forms:

- pose9d: position, rot6d (first two columns of the rotation, one after the other);
- pose6: position, rotation vector;
- pose7: position, quaternion (w, x, y, z).

All functions take numpy or jax arrays with any leading axes, keep their floating type, and can be differentiated
and compiled. NaN gives NaN; `rdt2_jax.actions.validation` turns values that cannot be used into errors.
"""

from __future__ import annotations

from typing import Any

from rdt2_jax.actions.arrays import (
    Array,
    as_arrays,
    common_shape,
    cross,
    matmul,
    require_trailing_shape,
    unit_vector,
    vector_norm,
)
from rdt2_jax.actions.rotations import (
    matrix_to_quaternion,
    matrix_to_rot6d,
    matrix_to_rotvec,
    quaternion_to_matrix,
    rot6d_to_matrix,
    rotvec_to_matrix,
)
from rdt2_jax.errors import DataError

# ---------------------------------------------------------------------------------------------- matrices


def make_pose(rotation: Array, position_m: Array) -> Array:
    """Rotation (..., 3, 3) and position (..., 3) -> (..., 4, 4); leading axes broadcast.

    Raises:
        DataError: when the last axes are not those.
    """
    xp, rotation, position_m = as_arrays(rotation, position_m)
    require_trailing_shape(rotation, (3, 3), "rotation matrix")
    require_trailing_shape(position_m, (3,), "position")
    dtype = xp.result_type(rotation.dtype, position_m.dtype)
    leading = common_shape("rotation and position", rotation.shape[:-2], position_m.shape[:-1])
    rotation = xp.broadcast_to(rotation, (*leading, 3, 3)).astype(dtype)
    position_m = xp.broadcast_to(position_m[..., None], (*leading, 3, 1)).astype(dtype)
    bottom = xp.broadcast_to(xp.asarray([[0.0, 0.0, 0.0, 1.0]], dtype=dtype), (*leading, 1, 4))
    return xp.concatenate([xp.concatenate([rotation, position_m], axis=-1), bottom], axis=-2)


def compose(a: Array, b: Array) -> Array:
    """The product a @ b of (..., 4, 4) matrices: `pose_x_y` and `pose_y_z` give `pose_x_z`."""
    xp, a, b = as_arrays(a, b)
    require_trailing_shape(a, (4, 4), "pose a")
    require_trailing_shape(b, (4, 4), "pose b")
    common_shape("pose a and pose b", a.shape[:-2], b.shape[:-2])
    return matmul(xp, a, b)


def invert(pose: Array) -> Array:
    """The inverse of rigid transforms (..., 4, 4), by transposing the rotation: `pose_a_b` gives `pose_b_a`.

    Exact only for rotations; `check_poses` tells whether a matrix is one.
    """
    xp, pose = as_arrays(pose)
    require_trailing_shape(pose, (4, 4), "pose")
    transposed = xp.swapaxes(pose[..., :3, :3], -1, -2)
    return make_pose(transposed, -matmul(xp, transposed, pose[..., :3, 3:])[..., 0])


def conjugate(pose: Array, change: Array) -> Array:
    """The same motion seen from another frame of the moving body: change @ pose @ inv(change).

    Args:
        pose: motion of frame b, (..., 4, 4): `pose_b0_b1`, frame b at time 1 expressed in itself at time 0.
        change: `pose_c_b`, (..., 4, 4), frame b in the frame c that is fixed to the same body.

    Returns:
        the motion of frame c, `pose_c0_c1`.
    """
    return compose(compose(change, pose), invert(change))


def transform_points(pose: Array, points_m: Array) -> Array:
    """Points (..., 3) [m] in frame b -> frame a, by `pose_a_b` (..., 4, 4); leading axes broadcast."""
    xp, pose, points_m = as_arrays(pose, points_m)
    require_trailing_shape(pose, (4, 4), "pose")
    require_trailing_shape(points_m, (3,), "points")
    common_shape("pose and points", pose.shape[:-2], points_m.shape[:-1])
    return matmul(xp, pose[..., :3, :3], points_m[..., None])[..., 0] + pose[..., :3, 3]


# ------------------------------------------------------------------------------------------- short forms


def pose9d_to_matrix(pose9d: Array) -> Array:
    """(..., 9) -> (..., 4, 4); the rotation is orthonormalised by Gram-Schmidt."""
    _, pose9d = as_arrays(pose9d)
    require_trailing_shape(pose9d, (9,), "pose9d")
    return make_pose(rot6d_to_matrix(pose9d[..., 3:]), pose9d[..., :3])


def matrix_to_pose9d(pose: Array) -> Array:
    """(..., 4, 4) -> (..., 9)."""
    xp, pose = as_arrays(pose)
    require_trailing_shape(pose, (4, 4), "pose")
    return xp.concatenate([pose[..., :3, 3], matrix_to_rot6d(pose[..., :3, :3])], axis=-1)


def pose6_to_matrix(pose6: Array) -> Array:
    """(..., 6) -> (..., 4, 4)."""
    _, pose6 = as_arrays(pose6)
    require_trailing_shape(pose6, (6,), "pose6")
    return make_pose(rotvec_to_matrix(pose6[..., 3:]), pose6[..., :3])


def matrix_to_pose6(pose: Array) -> Array:
    """(..., 4, 4) -> (..., 6), with rotation angles in [0, pi]."""
    xp, pose = as_arrays(pose)
    require_trailing_shape(pose, (4, 4), "pose")
    return xp.concatenate([pose[..., :3, 3], matrix_to_rotvec(pose[..., :3, :3])], axis=-1)


def pose7_to_matrix(pose7: Array) -> Array:
    """(..., 7) -> (..., 4, 4); the quaternion is normalised first."""
    _, pose7 = as_arrays(pose7)
    require_trailing_shape(pose7, (7,), "pose7")
    return make_pose(quaternion_to_matrix(pose7[..., 3:]), pose7[..., :3])


def matrix_to_pose7(pose: Array) -> Array:
    """(..., 4, 4) -> (..., 7), with w >= 0."""
    xp, pose = as_arrays(pose)
    require_trailing_shape(pose, (4, 4), "pose")
    return xp.concatenate([pose[..., :3, 3], matrix_to_quaternion(pose[..., :3, :3])], axis=-1)


def transform_pose(pose: Array, pose6: Array) -> Array:
    """A pose6 (..., 6) in frame b -> frame a, by the matrix `pose_a_b` (..., 4, 4)."""
    return matrix_to_pose6(compose(pose, pose6_to_matrix(pose6)))


def apply_delta_pose(pose6: Array, delta_pose6: Array) -> Array:
    """Adds a world-frame delta to a pose, both (..., 6): positions add, the delta rotation multiplies from the left.

    This is a displacement along and about fixed axes, not the rigid transform `compose(delta, pose)`.
    """
    xp, pose6, delta_pose6 = as_arrays(pose6, delta_pose6)
    require_trailing_shape(pose6, (6,), "pose6")
    require_trailing_shape(delta_pose6, (6,), "delta pose6")
    common_shape("pose6 and delta pose6", pose6.shape[:-1], delta_pose6.shape[:-1])
    position_m = pose6[..., :3] + delta_pose6[..., :3]
    rotation = matmul(xp, rotvec_to_matrix(delta_pose6[..., 3:]), rotvec_to_matrix(pose6[..., 3:]))
    return xp.concatenate([position_m, matrix_to_rotvec(rotation)], axis=-1)


def rotation_between_directions(start: Array, end: Array) -> Array:
    """The smallest rotation (..., 3, 3) that turns direction `start` (..., 3) into `end`; lengths do not matter.

    Opposite directions turn by pi about an axis chosen among the perpendicular ones. A zero vector has no
    direction and gives the identity.
    """
    xp, start, end = as_arrays(start, end)
    require_trailing_shape(start, (3,), "start direction")
    require_trailing_shape(end, (3,), "end direction")
    common_shape("start and end directions", start.shape[:-1], end.shape[:-1])
    start, end = unit_vector(xp, start), unit_vector(xp, end)
    middle = start + end
    length = vector_norm(xp, middle)[..., None]
    # The axis goes through the direction half-way, whose rounding error matters only where it is itself rounding.
    opposite = length <= 8 * xp.finfo(length.dtype).eps
    middle = middle / xp.where(opposite, xp.ones_like(length), length)
    axis = xp.where(opposite, _perpendicular(xp, start), cross(xp, start, middle))
    real = xp.where(opposite, xp.zeros_like(length), length / 2)
    return quaternion_to_matrix(xp.concatenate([real, axis], axis=-1))


# --------------------------------------------------------------------------------------------- sequences


def absolute_to_relative(base: Array, chunk: Array) -> Array:
    """Poses expressed in the base pose: inv(base) @ pose.

    Args:
        base: `pose_world_now` (..., 4, 4).
        chunk: `pose_world_future` (..., T, 4, 4).

    Returns:
        `pose_now_future` (..., T, 4, 4).
    """
    _, base, chunk = _base_and_chunk(base, chunk)
    return compose(invert(base), chunk)


def relative_to_absolute(base: Array, chunk: Array) -> Array:
    """Inverse of `absolute_to_relative`: base @ pose, base (..., 4, 4), chunk (..., T, 4, 4)."""
    _, base, chunk = _base_and_chunk(base, chunk)
    return compose(base, chunk)


def absolute_to_delta(base: Array, chunk: Array) -> Array:
    """Steps between neighbouring poses along and about the axes of the world frame, as in the public code.

    Args:
        base: `pose_world_now` (..., 4, 4), the pose before the first of the chunk.
        chunk: `pose_world_future` (..., T, 4, 4).

    Returns:
        (..., T, 4, 4): position difference, and rotation[t] @ inv(rotation[t - 1]). Not a rigid transform of
        anything: see `apply_delta_pose`.
    """
    xp, base, chunk = _base_and_chunk(base, chunk)
    before = xp.concatenate([base, chunk[..., :-1, :, :]], axis=-3)
    turned = matmul(xp, chunk[..., :3, :3], xp.swapaxes(before[..., :3, :3], -1, -2))
    return make_pose(turned, chunk[..., :3, 3] - before[..., :3, 3])


def delta_to_absolute(base: Array, chunk: Array) -> Array:
    """Inverse of `absolute_to_delta`: positions add up, rotations multiply from the left."""
    xp, base, chunk = _base_and_chunk(base, chunk)
    position_m = base[..., :3, 3] + xp.cumsum(chunk[..., :3, 3], axis=-2)
    products = xp.concatenate([base, chunk], axis=-3)[..., :3, :3]
    shift = 1
    while shift < products.shape[-3]:  # doubling: after k rounds each entry holds the product of 2^k steps
        later = matmul(xp, products[..., shift:, :, :], products[..., :-shift, :, :])
        products = xp.concatenate([products[..., :shift, :, :], later], axis=-3)
        shift *= 2
    return make_pose(products[..., 1:, :, :], position_m)


def _base_and_chunk(base: Array, chunk: Array) -> tuple[Any, Array, Array]:
    """The namespace, the base pose as a chunk of one (..., 1, 4, 4), and the chunk, with equal leading axes."""
    xp, base, chunk = as_arrays(base, chunk)
    require_trailing_shape(base, (4, 4), "base pose")
    require_trailing_shape(chunk, (4, 4), "pose chunk")
    if chunk.ndim < 3:
        raise DataError("a pose chunk needs a time axis", expected="(..., T, 4, 4)", found=str(chunk.shape))
    leading = common_shape("base pose and pose chunk", base.shape[:-2], chunk.shape[:-3])
    base = xp.broadcast_to(base[..., None, :, :], (*leading, 1, 4, 4))
    return xp, base, xp.broadcast_to(chunk, (*leading, *chunk.shape[-3:]))


def _perpendicular(xp: Any, direction: Array) -> Array:
    """A unit vector at right angles to a unit vector (..., 3), away from the axis it is most aligned with."""
    least = xp.argmin(xp.abs(direction), axis=-1)[..., None]
    axis = (xp.arange(3) == least).astype(direction.dtype)
    return unit_vector(xp, cross(xp, direction, axis))
