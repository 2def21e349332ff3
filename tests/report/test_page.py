"""The report's page: what is in it, and that a browser draws it without a network."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from eigenslice.errors import CheckpointError, OptionsError, OutputError
from eigenslice.report import ReportOptions, report
from eigenslice.report import page as page_module
from eigenslice.report.figures import spectra
from eigenslice.report.json_inputs import read_input
from eigenslice.report.measured import perplexities, speeds, tasks
from eigenslice.report.page import _json, short
from eigenslice.report.samples import generate
from tests import words
from tests.checkpoint.files import copy_of
from tests.conftest import Folders, Slicer
from tests.json_changes import changed, places
from tests.messages import check_message

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def figures_of(page: Path) -> dict[str, Any]:
    """The plots' data, by their ids."""
    text = page.read_text(encoding="utf-8")
    start = text.index('id="figures">') + len('id="figures">')
    return {plot["id"]: plot for plot in json.loads(text[start : text.index("</script>", start)])}


def bench_json(names: list[str]) -> dict[str, Any]:
    """What `bench --json` prints, with made-up numbers."""
    spread = {"median": 2.0, "low": 1.5, "high": 3.0, "runs": [2.0, 1.5, 3.0]}
    cost = {"parameters": 9, "disk_bytes": 1048576, "peak_bytes": 2097152, "operations": 5, "step_bytes": 7}
    rows: list[dict[str, Any]] = [
        {"model": name, "first_token": spread, "prefill": spread, "decode": spread} | cost for name in names
    ]
    gain = {"measured": 1.25, "ideal": 1.5, "share": 0.5}
    rows[1]["speedup"] = {"prefill": gain, "decode": gain}
    settings = {"batch": 1, "prompt": 4, "new": 2, "runs": 3, "compile": False}
    environment = {"device": "cpu", "threads": 1, "dtypes": ["float32", "float32"]}
    return {"settings": settings, "environment": environment, "models": rows}


def everything(dense: Path, sliced: Path, folder: Path) -> dict[str, Any]:
    """JSON files for all options."""
    names = [str(dense), str(sliced)]
    rows = [
        {"model": name, "perplexity": value, "loss": 1.0, "tokens": 5, "data": {"data": "wiki"}}
        for name, value in zip(names, (10.0, 12.5), strict=True)
    ]
    score = {"task": "piqa", "metric": "acc", "value": 0.75, "stderr": 0.01}
    content: dict[str, Any] = {
        "perplexity": rows,
        "bench": bench_json(names),
        "tasks": {"models": [{"model": name, "scores": [score]} for name in names]},
    }
    paths = {name: folder / f"{name}.json" for name in content}
    for name, path in paths.items():
        path.write_text(json.dumps(content[name]))
    return paths


@pytest.fixture
def models(dense_folder: Folders, run_slice: Slicer, tmp_path: Path) -> tuple[Path, Path]:
    """A dense model and a sliced one, with a tokenizer; the sliced one's manifest tells of fits and training, too."""
    dense = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(dense)
    sliced = run_slice("llama", model=str(dense), width=24, neurons=40).output
    path = sliced / "eigenslice.json"
    section = {
        "trained": "all weights",
        "steps": 2,
        "teacher": None,
        "data": {"data": "x.txt", "sequences": 3, "tokens": 12},
        "perplexity": {"before": 9.0, "after": 8.0, "tokens": 5},
        "loss": [[1, 2.0], [2, 1.5]],
        "held_out_loss": [[2, 1.75]],
        "options": {"model": "small", "output": "tuned", "full": True},
    }
    errors = [{"block": block, "error": 0.1 * block} for block in range(3)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finetune": section, "refit_errors": errors}))
    return dense, sliced


def test_everything_is_there(models: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sliced = models
    page = tmp_path / "page.html"
    prompt = words.text([5, 6, 7])
    options = ReportOptions(
        folder=sliced,
        output=page,
        generate=str(dense),
        prompts=(prompt,),
        new=4,
        device="cpu",
        **everything(dense, sliced, tmp_path),
    )
    assert report(options) == page
    plots = figures_of(page)
    assert list(plots) == [
        "roles",
        "spectrum",
        "refit",
        "perplexity",
        "tasks",
        "prefill",
        "decode",
        "memory",
        "training",
    ]
    manifest = json.loads((sliced / "eigenslice.json").read_text())
    before, after = (dict(zip(bars["x"], bars["y"], strict=True)) for bars in plots["roles"]["data"])
    assert sum(before.values()) == manifest["parameters"]["dense"]
    assert sum(after.values()) == manifest["parameters"]["stored"]
    line, cut = plots["spectrum"]["data"]
    assert (cut["x"], cut["y"][0]) == ([24], dict(zip(line["x"], line["y"], strict=True))[24])
    points = plots["perplexity"]["data"][0]
    assert points["x"] == [100.0, 100 * manifest["parameters"]["kept"]]
    assert points["y"] == [10.0, 12.5]
    assert plots["tasks"]["data"][0]["error_y"]["array"] == [0.01]
    assert plots["decode"]["data"][1]["error_y"] | {} == {
        "type": "data",
        "color": "text",
        "symmetric": False,
        "array": [1.0],
        "arrayminus": [0.5],
    }
    text = page.read_text(encoding="utf-8")
    hashes = manifest["source"]["sha256"]
    for wanted in (
        *hashes.values(),
        "32 → 24",
        "56 → 40",
        prompt,
        "eigenslice finetune small -o tuned --full",
        "1.25 (1.50)",
        f" {manifest['loss']['perplexity_ratio']:.3f}</b>",
        f"KL {manifest['loss']['kl']:.3f} nats per token",
        "before fine-tuning",
    ):
        assert wanted in text, wanted


def test_an_older_report_is_replaced_and_nothing_else(models: tuple[Path, Path], tmp_path: Path) -> None:
    _, sliced = models
    page = report(ReportOptions(folder=sliced))
    assert page == sliced.with_name(f"{sliced.name}-report.html")
    assert report(ReportOptions(folder=sliced)) == page
    other = tmp_path / "precious.html"
    other.write_text("<html>mine</html>")
    with pytest.raises(OutputError, match="is no report of eigenslice"):
        report(ReportOptions(folder=sliced, output=other))
    assert other.read_text() == "<html>mine</html>"


def test_what_can_not_be_reported(models: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sliced = models
    with pytest.raises(CheckpointError, match="is no sliced model"):
        report(ReportOptions(folder=dense))
    wrong = tmp_path / "wrong.json"
    for content in ("{", "{}", '{"models": [{}]}', "[1]"):
        wrong.write_text(content)
        for option in ("perplexity", "tasks", "bench"):
            if (option, content) == ("tasks", "[1]"):
                continue
            with pytest.raises(OptionsError):
                report(ReportOptions.model_validate({"folder": sliced, option: wrong}))
    assert not list(tmp_path.glob("*.html"))


def test_names_can_not_break_the_page(models: tuple[Path, Path], tmp_path: Path) -> None:
    _, sliced = models
    path = sliced / "eigenslice.json"
    manifest = json.loads(path.read_text())
    manifest["spectra"][0]["site"] = "</script><script>alert(1)</script>"
    manifest["calibration"]["data"] = "<img src=x onerror=alert(1)>"
    path.write_text(json.dumps(manifest))
    text = report(ReportOptions(folder=sliced)).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "<img src=x" not in text


ODD = "a|`b</script><script>alert(1)</script><b>"
BROKEN: list[Any] = [math.nan, math.inf, None, "x", [], {}, -1, 10**400, ..., [[[]]]]


@pytest.mark.parametrize("option", ["perplexity", "tasks", "bench"])
def test_any_json_is_drawn_or_refused(option: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    """One value after the other is replaced; numbers that can't be drawn never reach the page."""
    dense, sliced = models
    path = everything(dense, sliced, tmp_path)[option]
    genuine = json.loads(path.read_text())
    drawn = 0
    for place in [place for place in places(genuine) if place]:
        for value in [*BROKEN, ODD]:
            content = changed(genuine, place, value)
            path.write_text(json.dumps(content))
            try:
                found = read_input(option, path)
            except OptionsError as error:
                check_message(error, f"--{option} {path}")
                continue
            plots = {"perplexity": lambda c: [perplexities(c, {})], "tasks": lambda c: [tasks(c)], "bench": speeds}
            text = _json(plots[option](found))
            assert "<" not in text
            json.loads(text, parse_constant=pytest.fail)
            drawn += 1
    assert drawn >= 10


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 10**6, b"[NaN", b"9" * 5000, b"{}", b"null"], ids=lambda c: c[:5]
)
def test_files_that_hold_no_results(content: bytes, models: tuple[Path, Path], tmp_path: Path) -> None:
    _, sliced = models
    (tmp_path / "x.json").write_bytes(content)
    for option in ("perplexity", "tasks", "bench"):
        for path in (tmp_path / "x.json", tmp_path, Path("/dev/zero"), tmp_path / "none"):
            with pytest.raises(OptionsError, match=f"--{option}"):
                report(ReportOptions.model_validate({"folder": sliced, option: path}))
    assert not list(sliced.parent.glob("*.html"))


def test_numbers_that_can_not_be_drawn_are_gaps(models: tuple[Path, Path]) -> None:
    _, sliced = models
    path = sliced / "eigenslice.json"
    manifest = json.loads(path.read_text())
    manifest["refit_errors"] = [{"block": 0, "error": math.nan}, {"block": 1, "error": math.inf}]
    path.write_text(json.dumps(manifest))
    assert figures_of(report(ReportOptions(folder=sliced)))["refit"]["data"][0]["y"] == [None, None]


def test_a_large_loss_and_a_missing_one_are_said_in_words(run_slice: Slicer) -> None:
    result = run_slice("llama", width=24)
    path = result.output / "eigenslice.json"
    large = {"kl": 2.3, "perplexity_ratio": 8.5, "dense_perplexity": 2.0, "sliced_perplexity": 17.0, "tokens": 99}
    older = {name: value for name, value in result.manifest.items() if name != "loss"}
    for manifest, wanted in (
        (older | {"loss": large}, "much worse than the dense model (KL 2.300 nats per token"),
        (older | {"loss": {"not_measured": "too few"}}, "loss on held-out text: too few"),
        (older, "loss on held-out text: the manifest is of an older version"),
    ):
        path.write_text(json.dumps(manifest))
        assert wanted in report(ReportOptions(folder=result.output)).read_text(encoding="utf-8")


def test_a_report_of_the_folder_here(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, sliced = models
    monkeypatch.chdir(sliced)
    expected = sliced.with_name(f"{sliced.name}-report.html")
    assert report(ReportOptions(folder=Path())) == expected
    assert f"<h1>{sliced.name}</h1>" in expected.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "dangling", "file/x.html", "inside", ".", "/"])
def test_reports_that_can_not_be_written_are_refused_before_the_work(
    name: str, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sliced = models
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(page_module, "generate", lambda *arguments: pytest.fail("the work began"))
    output = sliced / "x.html" if name == "inside" else tmp_path / name
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError):
        report(ReportOptions(folder=sliced, output=output, generate=str(dense)))
    assert sorted(tmp_path.rglob("*")) == before


GENERATION: list[dict[str, Any]] = [
    {"num_beams": 4, "temperature": -1.0, "do_sample": True},
    {"return_dict_in_generate": True, "output_scores": True},
    {"eos_token_id": [[1]], "pad_token_id": 10**9},
    {"max_length": "x", "min_length": 10**9},
    {"custom_generate": "someone/code", "prompt_lookup_num_tokens": 3},
]


@pytest.mark.parametrize("config", GENERATION, ids=str)
def test_a_generation_config_changes_nothing_but_ends(config: dict[str, Any], models: tuple[Path, Path]) -> None:
    dense, _ = models
    file = dense / "generation_config.json"
    file.unlink(missing_ok=True)
    expected = generate([str(dense)], (words.text([5, 6, 7]),), 6, "cpu")
    file.write_text(json.dumps(config))
    assert generate([str(dense)], (words.text([5, 6, 7]),), 6, "cpu") == expected


def test_text_that_models_can_not_go_on_from(models: tuple[Path, Path]) -> None:
    dense, _ = models
    with pytest.raises(OptionsError, match="--new 62 after a prompt of 3 tokens"):
        generate([str(dense)], (words.text([5, 6, 7]),), 62, "cpu")
    with pytest.raises(CheckpointError, match="makes nothing of ''"):
        generate([str(dense)], ("",), 2, "cpu")


def test_each_site_of_a_per_block_result_has_its_spectrum(run_slice: Slicer) -> None:
    manifest = run_slice("opt", width=24, basis="per-block").manifest
    plot = spectra(manifest)
    assert plot is not None
    *lines, cuts = plot["data"]
    assert [line["name"] for line in lines] == [site["site"] for site in manifest["spectra"]]
    assert cuts["x"] == [24] * len(lines)


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (157584, "157.6 k"), (134515008, "134.5 M"), (7e9, "7.0 B")])
def test_short_numbers(count: int, text: str) -> None:
    assert short(count) == text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 390)])
def test_a_browser_draws_it_without_a_network(
    scheme: Any, width: int, models: tuple[Path, Path], tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    dense, sliced = models
    page = report(ReportOptions(folder=sliced, **everything(dense, sliced, tmp_path)))
    problems: list[str] = []
    requests: list[str] = []
    with sync_api.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        plots = tab.locator(".plot")
        assert plots.count() == len(figures_of(page)) == 9
        for number in range(plots.count()):
            plots.nth(number).locator(".trace path").first.wait_for(state="attached")
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert tab.evaluate("document.documentElement.scrollWidth") == width, "the page is wider than the window"
        browser.close()
    assert problems == []
    assert requests == [page.as_uri()]
    brightness = sum(int(part) for part in background.strip("rgb()").split(","))
    assert brightness > 600 if scheme == "light" else brightness < 150
