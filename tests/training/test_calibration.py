"""What was seen before an event, when a run goes on with another number of processes."""

from types import SimpleNamespace

import pytest
import torch
from ddp_runs import make_model
from safetensors.torch import load_file, save_file
from tiny import batch

from hf_compressm import CompressionConfig
from hf_compressm.compression import observe
from hf_compressm.training.calibration import Calibration
from hf_compressm.training.checkpoint import calibration_file


class Processes:
    """Calibrations of one event in several processes, which deal out each batch among themselves."""

    def __init__(self, model, count):
        self.model = model
        self.trainer = SimpleNamespace(compute_loss=lambda model, inputs: model(**inputs).loss)
        self.args = [SimpleNamespace(process_index=i, world_size=count, device="cpu") for i in range(count)]
        self.calibrations = []
        for args in self.args:
            observation = observe(model, CompressionConfig())
            observation.training_only = True
            for reducer in observation.reducers.values():
                reducer.rank, reducer.ranks = args.process_index, count
            self.calibrations.append(Calibration(observation, self.trainer, count=4))

    def see(self, *batches):
        for rows in batches:
            for calibration, part in zip(self.calibrations, rows.chunk(len(self.args)), strict=True):
                calibration.start()
                self.trainer.compute_loss(self.model, {"input_ids": part, "labels": part})
                calibration.stop()  # they share the model
        return self

    def save(self, checkpoint):
        for calibration, args in zip(self.calibrations, self.args, strict=True):
            calibration.start()
            assert calibration.save(args, checkpoint)
            calibration.stop()

    def resume(self, checkpoint):
        for calibration, args in zip(self.calibrations, self.args, strict=True):
            calibration.resume(args, [checkpoint])
        return self

    def sums(self):
        """Of all processes, as an event puts them together."""
        reducers = [calibration.observation.reducers for calibration in self.calibrations]
        found = {}
        for name, first in reducers[0].items():
            everything = [other[name].statistics() for other in reducers]
            first.reduce_over_ranks(SimpleNamespace(gather=lambda own, everything=everything: everything))
            found |= {f"{name}/{key}": value for key, value in first.statistics().items()}
        return found

    def batches(self):
        return [kept["input_ids"] for calibration in self.calibrations for kept in calibration._batches]


def assert_same_sums(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def model():
    return make_model("reducible_mamba").double().train()  # rounding differs with the size of batches


@pytest.fixture(scope="module")
def data():
    return batch(size=48, length=12)["input_ids"].chunk(4)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (4, 2), (3, 2), (2, 2)])
def test_fewer_processes_take_over_what_all_have_seen(model, data, tmp_path, caplog, before, after):
    Processes(model, before).see(*data[:2]).save(tmp_path)
    expected = Processes(model, 1).see(*data).sums()
    found = Processes(model, after).resume(tmp_path).see(*data[2:]).sums()
    assert_same_sums(found, expected)
    assert not caplog.text


def test_more_processes_count_nothing_twice(model, data, tmp_path, caplog):
    Processes(model, 1).see(*data[:2]).save(tmp_path)
    expected = Processes(model, 1).see(*data).sums()
    found = Processes(model, 2).resume(tmp_path).see(*data[2:]).sums()
    assert_same_sums(found, expected)
    assert not caplog.text


def test_a_process_whose_sums_are_gone_counts_on_with_the_others(model, data, tmp_path):
    Processes(model, 2).see(*data[:2]).save(tmp_path)
    (tmp_path / calibration_file(0)).unlink()
    resumed = Processes(model, 2).resume(tmp_path).see(*data[2:])
    name = next(iter(resumed.calibrations[0].observation.reducers))
    found = resumed.calibrations[0].observation.statistics()
    assert found[f"{name}/sequences"] == 48
    numbers = {int(key.partition("sample.")[2]) for key in found if key.startswith(f"{name}/sample.")}
    assert numbers == {*range(24, 30), *range(36, 42)}


def test_the_last_batches_of_all_are_measured_on(model, data, tmp_path):
    Processes(model, 2).see(*data[:3]).save(tmp_path)
    found = Processes(model, 1).resume(tmp_path).batches()
    expected = [part for rows in data[1:3] for part in rows.chunk(2)]
    assert len(found) == 4
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_nothing_of_an_earlier_run_of_more_processes_stays_in_a_checkpoint(model, data, tmp_path):
    Processes(model, 4).see(data[0]).save(tmp_path)
    later = Processes(model, 2)  # which have seen nothing at that step
    assert not any(c.save(args, tmp_path) for c, args in zip(later.calibrations, later.args, strict=True))
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_say_how_many_they_are_are_counted_and_others_left_alone(model, data, tmp_path):
    Processes(model, 2).see(*data[:2]).save(tmp_path)
    for file in tmp_path.iterdir():
        save_file(load_file(file), file)
    (tmp_path / calibration_file("copy")).write_text("of somebody")
    expected = Processes(model, 1).see(*data).sums()
    assert_same_sums(Processes(model, 1).resume(tmp_path).see(*data[2:]).sums(), expected)


def test_sums_that_are_gone_are_named_and_those_of_an_earlier_run_left_alone(model, data, tmp_path, caplog):
    Processes(model, 4).see(data[0]).save(tmp_path)
    Processes(model, 2).see(data[1]).save(tmp_path)  # the same step again, on fewer processes
    expected = Processes(model, 1).see(data[1]).sums()
    found = Processes(model, 1).resume(tmp_path).sums()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if "sample" in name)
    assert not caplog.text
    (tmp_path / "compressm_calibration_1.safetensors").unlink()
    Processes(model, 1).resume(tmp_path)
    assert "goes without what they hold" in caplog.text
    assert "compressm_calibration_1.safetensors" in caplog.text
