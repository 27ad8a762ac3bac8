"""What the tests of the scans share."""

import torch

MASKS = ["none", "left", "middle", "random", "empty row", "nothing"]


def make_mask(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    offsets = (torch.arange(batch)[:, None] + 1) * length // (batch + 2)
    steps = torch.arange(length)[None]
    return {
        "none": None,
        "all real": mask,
        "left": steps >= offsets,
        "right": steps < length - offsets,
        "middle": (steps < length // 3) | (steps >= length // 3 + offsets),
        "random": torch.rand(batch, length) > 0.4,
        "empty row": mask.index_fill(0, torch.tensor([batch - 1]), False),
        "nothing": ~mask,
    }[kind]


def make_lru_inputs(batch, length, n, width, p, dtype=torch.float64, radius=None):
    """Arguments of `lru_scan` up to the initial state."""
    radius = torch.rand(n, dtype=dtype) ** 0.1 if radius is None else torch.full((n,), radius, dtype=dtype)
    lam = torch.polar(radius, torch.rand(n, dtype=dtype) * 6.28)
    shapes = [(n, width), (n, width), (p, n), (p, n), (batch, n, 2)]
    tensors = [torch.randn(batch, length, width, dtype=dtype), lam.real.clone(), lam.imag.clone()]
    tensors += [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def outputs_and_gradients(scan, inputs, mask=None, **options):
    y, h_last = scan(*inputs, mask=mask, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, h_last)]
    loss = sum((x * weight.to(x.device)).sum() for x, weight in zip((y, h_last), weights, strict=True))
    return [y, h_last, *torch.autograd.grad(loss, inputs)]


def assert_same(actual, expected, rtol):
    """Each tensor relative to its own largest element, so that a small gradient counts as much as a large one."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert (a - e).abs().max() <= rtol * e.abs().max()


def to_float32(inputs):
    return [x.detach().float().requires_grad_() for x in inputs]


def steps_between(smallest, largest, *shape):
    """Random step sizes over all orders of magnitude from `smallest` to `largest`."""
    exponents = torch.rand(shape, dtype=torch.float64)
    return smallest * (largest / smallest) ** exponents


def count_graph_nodes(scan, inputs, **options):
    """The number of nodes of the one graph that torch.compile makes of the scan, and the compiled outputs."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    outputs = torch.compile(scan, backend=backend, fullgraph=True)(*inputs, **options)
    (nodes,) = graphs
    return nodes, outputs


def largest_allocation(run):
    """Numbers (of four bytes) in the largest tensor that is allocated while `run()` runs."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    return max(event.self_cpu_memory_usage for event in profiler.events()) // 4


def gated_inputs(batch, length, channels, n, smallest=-4.0, largest=2.0):
    """u, delta, A, B, C, D, z, delta_bias, h0 in float64; step sizes from softplus(smallest) to softplus(largest)."""
    wide, vectors, per_channel = (batch, length, channels), (batch, length, n), (channels,)
    delta = smallest + (largest - smallest) * torch.rand(wide, dtype=torch.float64)
    tensors = [torch.randn(wide, dtype=torch.float64), delta - 0.5]
    tensors += [-4 * torch.rand(channels, n, dtype=torch.float64)]
    shapes = [vectors, vectors, per_channel, wide]
    tensors += [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors += [torch.full(per_channel, 0.5, dtype=torch.float64)]
    tensors += [torch.randn(batch, channels, n, dtype=torch.float64)]
    return [x.requires_grad_() for x in tensors]


def gated_outputs_and_gradients(scan, inputs):
    outputs = scan(*inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]
