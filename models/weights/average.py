"""The mean of the weights of several checkpoints."""

from collections.abc import Mapping

from torch import Tensor


class Mean:
    """The mean of state dicts of one model, taken in one after the other, in float64.

    Numbers that are no floats, such as counters, are those of the state dict taken in last.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._last: Mapping[str, Tensor] = {}

    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Take in a state dict.

        Raises:
            ValueError: a tensor is missing, of another shape or type than before, or not finite;
                nothing was taken in.
        """
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"'{name}' is not finite in places")
        if self.count and (odd := weights.keys() ^ self._last.keys()):
            raise ValueError(f"'{min(odd)}' is in some of the checkpoints alone")
        for name, before in self._last.items():
            found = weights[name]
            if (found.shape, found.dtype) != (before.shape, before.dtype):
                raise ValueError(
                    f"'{name}' is {tuple(found.shape)} {found.dtype}, in others "
                    f"{tuple(before.shape)} {before.dtype}"
                )
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                value = tensor.double()
                self._sums[name] = self._sums[name].add_(value) if self.count else value.clone()
        self.count += 1
        self._last = weights

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean, in the types of the weights; one must have been taken in."""
        return {
            name: (self._sums[name] / self.count).to(last.dtype) if name in self._sums else last
            for name, last in self._last.items()
        }
