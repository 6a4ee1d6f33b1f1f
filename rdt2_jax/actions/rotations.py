"""Rotations: rot6d, matrices, rotation vectors, quaternions, and the angle between two of them.

All functions take numpy or jax arrays with any leading axes and can be differentiated and compiled. They are
total: degenerate input gives finite numbers (documented at each function) and NaN gives NaN;
`rdt2_jax.actions.validation` is what turns either into an error. rot6d is the first two COLUMNS of the matrix, one
after the other (Zhou et al. 2019, arXiv 1812.07035, with columns as in the public RDT2 code). Quaternions are unit,
scalar first (w, x, y, z), w >= 0.
"""

from __future__ import annotations

from rdt2_jax.actions.arrays import Array, as_arrays, cross, matmul, require_trailing_shape, unit_vector, vector_norm

_PUBLISHED_COSINE_MARGIN = 1e-7
"""The public code clips cosines to [-1 + 1e-7, 1 - 1e-7]; its loss and metric carry the trace of it."""


def rot6d_to_matrix(rot6d: Array) -> Array:
    """Gram-Schmidt: (..., 6) -> (..., 3, 3).

    Degenerate input (a zero column, parallel columns) gives a finite matrix that is not a rotation, as
    published.
    """
    xp, rot6d = as_arrays(rot6d)
    require_trailing_shape(rot6d, (6,), "rot6d")
    first = unit_vector(xp, rot6d[..., 0:3])
    second = rot6d[..., 3:6]
    second = unit_vector(xp, second - xp.sum(first * second, axis=-1, keepdims=True) * first)
    return xp.stack([first, second, cross(xp, first, second)], axis=-1)


def matrix_to_rot6d(matrix: Array) -> Array:
    """The first two columns, one after the other: (..., 3, 3) -> (..., 6)."""
    xp, matrix = as_arrays(matrix)
    require_trailing_shape(matrix, (3, 3), "rotation matrix")
    return xp.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)


def rotvec_to_matrix(rotvec: Array) -> Array:
    """Rodrigues' formula: rotation vector [rad] (..., 3) -> (..., 3, 3). Angles beyond pi wrap around."""
    return quaternion_to_matrix(rotvec_to_quaternion(rotvec))


def matrix_to_rotvec(matrix: Array) -> Array:
    """Rotation vector [rad] with angle in [0, pi]: (..., 3, 3) -> (..., 3).

    At exactly pi the sign of the axis is arbitrary (both describe the same rotation); accuracy near pi is that
    of the floating type, because the angle comes from an arctangent of quaternion parts, never an arccosine.
    """
    return quaternion_to_rotvec(matrix_to_quaternion(matrix))


def rotvec_to_quaternion(rotvec: Array) -> Array:
    """Rotation vector [rad] (..., 3) -> unit quaternion (w, x, y, z), w >= 0."""
    xp, rotvec = as_arrays(rotvec)
    require_trailing_shape(rotvec, (3,), "rotation vector")
    squared = xp.sum(rotvec * rotvec, axis=-1, keepdims=True)
    small = squared < 1e-8
    angle = xp.sqrt(xp.where(small, xp.ones_like(squared), squared))
    # sin(a/2)/a = 1/2 - a^2/48 + O(a^4): below a = 1e-4 the next term is under 1e-19.
    scale = xp.where(small, 0.5 - squared / 48.0, xp.sin(angle / 2) / angle)
    real = xp.where(small, 1.0 - squared / 8.0, xp.cos(angle / 2))
    return _non_negative_real(xp, xp.concatenate([real, scale * rotvec], axis=-1))


def quaternion_to_rotvec(quaternion: Array) -> Array:
    """Unit quaternion (w, x, y, z) -> rotation vector [rad] with angle in [0, pi]."""
    xp, quaternion = as_arrays(quaternion)
    require_trailing_shape(quaternion, (4,), "quaternion")
    quaternion = _non_negative_real(xp, quaternion)
    real, imaginary = quaternion[..., :1], quaternion[..., 1:]
    squared = xp.sum(imaginary * imaginary, axis=-1, keepdims=True)
    small = squared < 1e-14
    norm = xp.sqrt(xp.where(small, xp.ones_like(squared), squared))
    return xp.where(small, 2.0 * xp.ones_like(norm), 2.0 * xp.arctan2(norm, real) / norm) * imaginary


def quaternion_to_matrix(quaternion: Array) -> Array:
    """Quaternion (w, x, y, z), normalised first, -> (..., 3, 3). A zero quaternion gives the identity."""
    xp, quaternion = as_arrays(quaternion)
    require_trailing_shape(quaternion, (4,), "quaternion")
    w, x, y, z = (quaternion[..., i] for i in range(4))
    squared = w * w + x * x + y * y + z * z
    zero = squared < xp.finfo(squared.dtype).tiny  # below it, the division would overflow
    s = xp.where(zero, xp.zeros_like(squared), 2.0 / xp.where(zero, xp.ones_like(squared), squared))
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)],
        [s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x)],
        [s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)],
    ]
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quaternion(matrix: Array) -> Array:
    """(..., 3, 3) -> unit quaternion (w, x, y, z), w >= 0.

    Shepperd's method (J. Guidance and Control 1(3), 1978): of four equivalent expressions the one with the
    largest divisor is taken, so that no angle loses accuracy.
    """
    xp, m = as_arrays(matrix)
    require_trailing_shape(m, (3, 3), "rotation matrix")
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    yz, zx, xy = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    sxy, szx, syz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    # Row i is the quaternion scaled by four times its i-th component.
    candidates = xp.stack(
        [
            xp.stack([1 + m00 + m11 + m22, yz, zx, xy], axis=-1),
            xp.stack([yz, 1 + m00 - m11 - m22, sxy, szx], axis=-1),
            xp.stack([zx, sxy, 1 - m00 + m11 - m22, syz], axis=-1),
            xp.stack([xy, szx, syz, 1 - m00 - m11 + m22], axis=-1),
        ],
        axis=-2,
    )
    diagonal = xp.stack([candidates[..., i, i] for i in range(4)], axis=-1)
    best = xp.argmax(diagonal, axis=-1)[..., None, None]
    chosen = xp.take_along_axis(candidates, best, axis=-2)[..., 0, :]
    return _non_negative_real(xp, unit_vector(xp, chosen))


def geodesic_angle(a: Array, b: Array) -> Array:
    """Angle [rad] of inv(a) @ b in [0, pi] for rotation matrices (..., 3, 3), accurate at both ends.

    The sine comes from the antisymmetric part and the cosine from the trace, so identical rotations give 0
    (an arccosine would give up to 0.03 degrees in float32).
    """
    xp, a, b = as_arrays(a, b)
    require_trailing_shape(a, (3, 3), "rotation matrix a")
    require_trailing_shape(b, (3, 3), "rotation matrix b")
    between = matmul(xp, xp.swapaxes(a, -1, -2), b)
    twice_sine = vector_norm(
        xp,
        xp.stack(
            [
                between[..., 2, 1] - between[..., 1, 2],
                between[..., 0, 2] - between[..., 2, 0],
                between[..., 1, 0] - between[..., 0, 1],
            ],
            axis=-1,
        ),
    )
    twice_cosine = between[..., 0, 0] + between[..., 1, 1] + between[..., 2, 2] - 1.0
    # Two degenerate matrices can give 0 and 0, where the arctangent is 0 but its derivative is not a number.
    undefined = (twice_sine == 0) & (twice_cosine == 0)
    return xp.arctan2(twice_sine, xp.where(undefined, xp.ones_like(twice_cosine), twice_cosine))


def geodesic_angle_as_published(a: Array, b: Array) -> Array:
    """The public code's angle [rad]: arccosine with the cosine clipped by 1e-7 on both sides.

    Identical rotations score about 0.028 degrees in float32, with a zero gradient there. Used where numbers
    must compare with the published ones (the tokenizer's loss, the paper's metrics); `geodesic_angle` is for the
    rest.
    """
    xp, a, b = as_arrays(a, b)
    require_trailing_shape(a, (3, 3), "rotation matrix a")
    require_trailing_shape(b, (3, 3), "rotation matrix b")
    trace = xp.sum(a * b, axis=(-2, -1))
    limit = 1.0 - _PUBLISHED_COSINE_MARGIN
    return xp.arccos(xp.clip((trace - 1.0) / 2.0, -limit, limit))


def _non_negative_real(xp: Array, quaternion: Array) -> Array:
    return xp.where(quaternion[..., :1] < 0, -quaternion, quaternion)
