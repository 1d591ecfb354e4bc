"""The dashboard and the alerts: sound, and about metrics, labels and values that the node has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from p2pgz.web.metrics import METRICS

CONFIGS = Path(__file__).parents[2] / "configs"
DASHBOARD = CONFIGS / "grafana" / "p2pgz.json"
ALERTS = CONFIGS / "prometheus" / "alerts.yaml"
pytestmark = pytest.mark.skipif(not CONFIGS.is_dir(), reason="configs/ is not part of what is installed")

SERIES = re.compile(r"\b(p2pgz_[a-z0-9_]+)\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')
# labels that the scraper adds, and variables of the dashboard
SCRAPERS = {"job", "instance"}


def known() -> dict[str, dict[str, tuple[str, ...]]]:
    """Every series with its labels and their values."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for metric in METRICS:
        for ending in ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",):
            found[metric.full_name + ending] = dict(metric.labels)
    return found


def check_expression(text: str) -> set[str]:
    """The metrics of an expression, each known, with labels and values that there are."""
    series = known()
    seen = set()
    for name, matchers in SERIES.findall(text):
        assert name in series, f"{name}: no such metric, in {text}"
        seen.add(name)
        for label, operator, value in MATCHER.findall(matchers):
            if label in SCRAPERS:
                continue
            assert label in series[name], f"{name} has no label {label}"
            values = series[name][label]
            pattern = value if operator in ("=~", "!~") else re.escape(value)
            assert any(re.fullmatch(pattern, each) for each in values), f"{name}: {label} is never {value}"
    return seen


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text("utf-8"))["panels"]


def alerts() -> list[dict[str, Any]]:
    document = yaml.safe_load(ALERTS.read_text("utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def test_a_wrong_name_label_or_value_is_noticed() -> None:
    for text in (
        "p2pgz_nonsense",
        'p2pgz_chunks_total{origin="peer"}',
        'p2pgz_chunks_total{source="moon"}',
        "p2pgz_chunks",
    ):
        with pytest.raises(AssertionError):
            check_expression(text)
    assert check_expression('rate(p2pgz_chunks_total{source=~"peer|pool"}[5m])') == {"p2pgz_chunks_total"}


def test_the_dashboard_asks_for_what_there_is() -> None:
    document = json.loads(DASHBOARD.read_text("utf-8"))
    assert document["uid"] == "p2pgz"
    used: set[str] = set()
    for panel in panels():
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            found = check_expression(target["expr"])
            assert found, f"{panel['title']}: {target['expr']}"
            used |= found
    assert len(used) > 20
    for variable in document["templating"]["list"]:
        check_expression(variable.get("definition", ""))


def test_no_two_panels_cover_each_other() -> None:
    places: dict[tuple[int, int], str] = {}
    for panel in panels():
        spot = panel["gridPos"]
        assert spot["x"] + spot["w"] <= 24
        for x in range(spot["x"], spot["x"] + spot["w"]):
            for y in range(spot["y"], spot["y"] + spot["h"]):
                assert (x, y) not in places, f"{panel['title']} covers {places.get((x, y))}"
                places[x, y] = panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_each_alert_is_about_what_there_is_and_says_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names) >= 10
    for rule in alerts():
        if "up{" not in rule["expr"]:
            assert check_expression(rule["expr"]), rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "action"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_alerts(tmp_path: Path) -> None:
    subprocess.run(["promtool", "check", "rules", str(ALERTS)], check=True, capture_output=True, timeout=60)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say_against_a_scrape() -> None:
    from p2pgz.web import scrape
    from tests.unit.web.test_http import measures

    text, _ = scrape.render(measures(), "text/plain")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
