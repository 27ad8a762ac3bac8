import pytest
import torch
from mor.random_systems import lru_system, simulate, unit_circle

from hf_compressm.mor import DiagonalSystem, StateSpace, float64_device, promote, real_embedding


def test_real_and_complex_realizations_have_the_same_output():
    system = lru_system(6, 3)
    u = torch.randn(40, 3, dtype=torch.float64)
    real, complex_ = system.real(), system.complex()
    expected = simulate(complex_.A, complex_.B, complex_.C, u).real
    torch.testing.assert_close(simulate(real.A, real.B, real.C, u), expected, rtol=1e-12, atol=1e-12)
    assert (system.order, complex_.order, real.order) == (6, 6, 12)


def test_transfer_function_is_the_z_transform_of_the_impulse_response():
    system = lru_system(5, 2, r_min=0.3, r_max=0.8).real()
    z = unit_circle(7)
    powers = [torch.linalg.matrix_power(system.A, k) for k in range(200)]
    expected = sum((system.C @ A @ system.B) * z[:, None, None] ** -k for k, A in enumerate(powers))
    torch.testing.assert_close(system.transfer_function(z), expected, rtol=0, atol=1e-12)


def test_transfer_function_of_a_diagonal_system_is_that_of_its_real_map():
    system = lru_system(5, 2)
    z = unit_circle(11)
    expected = system.real().transfer_function(z)
    torch.testing.assert_close(system.transfer_function(z), expected, rtol=1e-10, atol=1e-10)


def test_transfer_function_in_blocks_equals_point_by_point():
    system = lru_system(1500, 1).complex()  # one point per block
    z = unit_circle(2)
    expected = torch.stack([system.C @ ((1 / (1 - system.A.diagonal() / point))[:, None] * system.B) for point in z])
    torch.testing.assert_close(system.transfer_function(z), expected, rtol=1e-10, atol=1e-10)


def test_batched_systems_agree_with_single_ones():
    systems = [lru_system(4, 2, seed=seed) for seed in range(3)]
    batch = DiagonalSystem(*(torch.stack([getattr(s, name) for s in systems]) for name in ("lam", "B", "C")))
    z = unit_circle(5)
    torch.testing.assert_close(batch.transfer_function(z), torch.stack([s.transfer_function(z) for s in systems]))
    torch.testing.assert_close(batch.real().A, torch.stack([s.real().A for s in systems]))
    torch.testing.assert_close(batch.complex().spectral_radius, batch.lam.abs().amax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
def test_any_dtype_is_promoted_and_detached(dtype):
    parameters = [torch.full(shape, 0.5, dtype=dtype, requires_grad=True) for shape in ((3,), (3, 2), (2, 3))]
    system = DiagonalSystem(*parameters)
    for tensor in (system.lam, system.B, system.C):
        assert tensor.dtype == torch.complex128
        assert not tensor.requires_grad
    assert system.real().A.dtype == torch.float64


def test_promotion_keeps_every_bit_of_a_float32():
    values = torch.randn(100)
    assert torch.equal(promote(values, torch.float64).float(), values)


def test_devices_without_float64_are_replaced_by_the_cpu():
    assert float64_device("mps") == torch.device("cpu")
    assert float64_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (4, 2), (2, 3)),
        ((3,), (3, 2), (2, 4)),
        ((), (1, 2), (2, 1)),
        ((0,), (0, 2), (2, 0)),
        ((3,), (3,), (2, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"needs lam .* found"):
        DiagonalSystem(*(torch.zeros(shape) for shape in shapes))


def test_real_embedding_is_a_homomorphism():
    a, b = torch.randn(2, 4, 4, dtype=torch.complex128)
    torch.testing.assert_close(real_embedding(a) @ real_embedding(b), real_embedding(a @ b))
    torch.testing.assert_close(real_embedding(a).T, real_embedding(a.mH))


def test_spectral_radius_of_a_dense_system():
    A = torch.tensor([[0.0, -0.25], [1.0, 0.0]], dtype=torch.float64)  # eigenvalues +-0.5i
    assert StateSpace(A, A, A).spectral_radius.item() == pytest.approx(0.5)
