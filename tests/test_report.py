import json
from dataclasses import replace

import pytest

from hf_compressm.report import REPORT_NAME, CompressionEvent, CompressionReport, LayerReport


@pytest.fixture
def report():
    def layer(name, before, after, **more):
        spectrum = [2.0**-i for i in range(2 * before)]
        return LayerReport(name, before, after, hankel_singular_values=spectrum, **more)

    first = [
        layer("layers.0.mixer", 16, 10, method="real", energy_discarded=0.02, error_bound=0.3, relative_error=0.01),
        layer("layers.1.mixer", 16, 16, note="IllConditioned: found NaN"),
    ]
    second = [
        layer("layers.0.mixer", 10, 6, method="complex", energy_discarded=0.04, error_bound=0.5, relative_error=0.02),
        layer("layers.1.mixer", 16, 16),
    ]
    return CompressionReport(
        {"tolerance": 0.05}, [CompressionEvent(first, 0.5, 25), CompressionEvent(second, 0.4, 50)]
    )


def test_the_file_reads_back_as_the_same_report(report, tmp_path):
    path = report.save(tmp_path / "run")
    assert path == tmp_path / "run" / REPORT_NAME
    assert CompressionReport.load(path) == CompressionReport.load(tmp_path / "run") == report


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        CompressionReport.load(tmp_path)
    (tmp_path / REPORT_NAME).write_text(json.dumps({"something": "else"}))
    with pytest.raises(ValueError, match="is not a compression report"):
        CompressionReport.load(tmp_path)


def test_the_summary_counts_only_reduced_layers(report):
    summary = report.events[1].summary()
    assert summary["compressm/total_state_size"] == 22
    assert summary["compressm/layers_reduced"] == 1
    assert summary["compressm/max_energy_discarded"] == 0.04
    assert summary["compressm/max_error_bound"] == 0.5
    assert summary["compressm/state_size/layers.1.mixer"] == 16


def test_the_table_goes_from_the_first_size_to_the_last(report):
    rows = str(report).splitlines()
    assert rows[1].split()[:3] == ["layers.0.mixer", "16", "6"]
    assert str(CompressionReport({})) == "no reduction has taken place"


def test_the_plot_shows_every_layer_and_every_event(report, tmp_path):
    figure = report.plot(tmp_path / "plot.png")
    sizes, *spectra = figure.axes
    assert [list(line.get_ydata()) for line in sizes.lines] == [[16, 10, 6], [16, 16, 16]]
    assert list(sizes.lines[0].get_xdata()) == [0, 25, 50]
    assert [ax.get_title() for ax in spectra] == ["layers.0.mixer", "layers.1.mixer"]
    curves = [line for line in spectra[0].lines if len(line.get_ydata()) > 1]
    assert [len(line.get_ydata()) for line in curves] == [32, 20]  # before the first event, before the second
    cuts = [line for line in spectra[0].lines if len(line.get_ydata()) == 1]
    assert [int(line.get_xdata()[0]) for line in cuts] == [20, 12]
    assert not [line for line in spectra[1].lines if len(line.get_ydata()) == 1]  # never reduced
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        CompressionReport({}).plot()


def test_the_plot_shows_the_loss_with_the_reductions_marked(report):
    history = [{"step": step, "loss": 100 / step} for step in (20, 40, 60)] + [{"step": 60, "eval_loss": 1.5}]
    sizes, loss, *_ = report.plot(log_history=history).axes
    assert list(sizes.lines[0].get_xdata()) == [0, 25, 50, 60]  # up to the end of the run
    training, evaluation, *marks = loss.lines
    assert list(training.get_xdata()) == [20, 40, 60]
    assert list(training.get_ydata()) == [5.0, 2.5, 100 / 60]
    assert list(evaluation.get_ydata()) == [1.5]
    assert [mark.get_xdata()[0] for mark in marks] == [25, 50]


def test_the_plot_goes_back_where_a_reduction_was_taken_back(report):
    second = replace(report.events[1], rolled_back_at=60)
    sizes, *_ = CompressionReport({}, [report.events[0], second]).plot(log_history=[{"step": 80, "loss": 1}]).axes
    assert list(zip(*sizes.lines[0].get_data(), strict=True)) == [(0, 16), (25, 10), (50, 6), (60, 10), (80, 10)]


def test_of_many_layers_some_are_drawn(report):
    layers = [replace(report.events[0].layers[0], name=f"layers.{i}.mixer") for i in range(20)]
    _, *spectra = CompressionReport({}, [CompressionEvent(layers, 0.1)]).plot().axes
    assert [ax.get_title() for ax in spectra] == [f"layers.{i}.mixer" for i in (0, 4, 8, 11, 15, 19)]


def test_reports_of_before_there_was_a_record_of_the_run_load(report):
    data = report.to_dict()
    del data["run"]
    assert CompressionReport.from_dict(data) == report
