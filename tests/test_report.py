import json

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


def test_the_plot_shows_every_layer(report, tmp_path):
    figure = report.plot(tmp_path / "plot.png")
    sizes, spectra = figure.axes
    assert [list(line.get_ydata()) for line in sizes.lines] == [[16, 10, 6], [16, 16, 16]]
    assert list(sizes.lines[0].get_xdata()) == [0, 25, 50]
    assert len(spectra.lines[0].get_ydata()) == 32
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        CompressionReport({}).plot()
