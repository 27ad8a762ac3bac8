"""Balanced truncation against pyMOR's, an implementation that nobody here wrote."""

import warnings

import pytest
import torch
from mor.random_systems import MAX_PHASES, lru_system, unit_circle

from hf_compressm.mor import balance, real_gramians, truncate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations are not ours to fail on
    from pymor.core.logger import set_log_levels
    from pymor.models.iosys import LTIModel
    from pymor.reductors.bt import BTReductor

set_log_levels({"pymor": "ERROR"})


@pytest.mark.parametrize("max_phase", MAX_PHASES)
@pytest.mark.parametrize(("states", "channels", "order"), [(8, 1, 5), (32, 4, 15), (64, 8, 40)])
@pytest.mark.filterwarnings("ignore")
def test_reduced_transfer_function_equals_pymor(states, channels, order, max_phase):
    system = lru_system(states, channels, r_min=0.7, r_max=0.98, max_phase=max_phase)
    dense = system.real()
    reduced = truncate(dense, *balance(*real_gramians(system)).projection(order))
    model = LTIModel.from_matrices(dense.A.numpy(), dense.B.numpy(), dense.C.numpy(), sampling_time=1.0)
    theirs = BTReductor(model).reduce(order)

    z = unit_circle(60)
    # pyMOR reads the state before the input enters it: one step of delay, a factor 1/z, less.
    expected = torch.stack([torch.from_numpy(theirs.transfer_function.eval_tf(complex(point))) for point in z])
    found = reduced.transfer_function(z) / z[:, None, None]
    scale = torch.linalg.matrix_norm(expected, ord=2).max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * scale)
