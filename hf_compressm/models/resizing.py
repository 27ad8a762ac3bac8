"""Rows of a weight that belong to the state, changed in number."""

from torch import nn

from ..surgery.parameters import resize_parameter_


def resize_rows_(param: nn.Parameter, first: int, new: int, last: int = 0) -> None:
    """Give `param` `new` rows of zeros between its `first` and its `last` rows, which keep their contents."""
    data = param.new_zeros(first + new + last, *param.shape[1:])
    data[:first] = param.detach()[:first]
    data[first + new :] = param.detach()[param.shape[0] - last :]
    resize_parameter_(param, data)
