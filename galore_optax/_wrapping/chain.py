# SPDX-License-Identifier: Apache-2.0
"""`chain`, in which `galore` takes what follows it as its inner."""

import optax

from galore_optax._galore import Filter, Projecting, bind


def chain(
    *transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, but whatever follows `galore(...)` runs in the projected space.

    `chain(a, galore(rank=r), b, c)` equals
    `optax.chain(a, galore(optax.chain(b, c), rank=r))`. A `galore` that has an inner
    already, or comes last, is chained as it is.

    Args:
      *transforms: applied in this order; at most one `galore` without an inner.

    Returns:
      the transformation.

    Raises:
      ValueError: two `galore(...)` without an inner.
      TypeError: an argument is no transformation.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     galore_optax.galore(rank=4),
      ...     optax.adamw(3e-4))
    """
    for number, transform in enumerate(transforms):
        if not isinstance(transform, optax.GradientTransformation):
            raise TypeError(
                f"argument {number} of chain, {transform!r}, is no"
                " optax.GradientTransformation. Pass transformations only."
            )
    places = [i for i, tx in enumerate(transforms) if isinstance(tx, Filter)]
    if len(places) > 1:
        raise ValueError(
            f"chain has galore without an inner at places {places}; the second would"
            " project what is projected already. Keep one of them."
        )
    if places and any(isinstance(tx, Projecting) for tx in transforms[places[0] + 1 :]):
        raise ValueError(
            f"chain has galore at place {places[0]}, and after it one that projects by"
            " itself: coordinates would be projected again. Keep one of them."
        )
    if not places or places[0] == len(transforms) - 1:
        return optax.with_extra_args_support(optax.chain(*transforms))
    (place,) = places
    config = transforms[place].config
    inner = optax.chain(*transforms[place + 1 :])
    return optax.chain(*transforms[:place], bind(config, inner))
