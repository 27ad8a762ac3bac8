"""Optimizer parameter groups for state space models."""

from torch import nn

from .reducers import find_reducible


def ssm_param_groups(
    model: nn.Module, lr: float, ssm_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups that treat the recurrences apart, for any `torch.optim` optimizer.

    The parameters of the recurrences (all of a MIMO SSM layer; `A_log`, `D` and what makes the time step, and in Mamba
    `B` and `C`) are usually trained with a smaller learning rate than the rest and without weight decay, which would
    pull the eigenvalues towards an arbitrary point (Orvieto et al., 2023, appendix B). Biases, norms and other vectors
    have no weight decay either.

    Args:
        model: any model with reducible layers.
        lr: learning rate of the rest.
        ssm_lr: learning rate of the recurrences; None: the same.
        weight_decay: of the matrices outside the recurrences.

    Returns:
        Up to three groups: decayed, not decayed, state space. Parameters without gradient are left out.

    Raises:
        ValueError: `model` has no reducible layer.

    Example:

    ```python
    >>> from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM, ssm_param_groups

    >>> model = MimoSSMForCausalLM(MimoSSMConfig(vocab_size=16, hidden_size=4, state_size=8, num_hidden_layers=1))
    >>> [group["lr"] for group in ssm_param_groups(model, lr=4e-3, ssm_lr=1e-3)]
    [0.004, 0.004, 0.001]

    ```
    """
    layers = find_reducible(model).values()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no reducible layer: there is no state space group to make.")
    ssm = {
        id(param)
        for module, reducer in layers
        for name, param in module.named_parameters()
        if reducer.state_parameters is None or name in reducer.state_parameters
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in ssm]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in ssm],
            "lr": lr if ssm_lr is None else ssm_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
