"""The report in a real browser: the page and its switch work, without requests and without errors."""

import pytest
from weighted_mtp_core.metrics.critic_report import ReliabilityBin
from weighted_mtp_core.report.page import write_report
from weighted_mtp_core.report.token_report import (
    ProblemTokens,
    Solution,
    Token,
    TokenReport,
    save_token_report,
)
from weighted_mtp_core.tracking.journal import Journal


@pytest.fixture(autouse=True)
def environment():
    """Override the fixture that starts the tracking stack: a page in a folder needs no server."""


def solution(name, reward, text, numbers):
    words = text.split("|")
    tokens = tuple(
        Token(text=word, weight=weight, loss_K=(loss, 2 * loss), value=value, change=change)
        for word, (weight, value, change, loss) in zip(words, numbers, strict=True)
    )
    return Solution(name=name, reward=reward, tokens=tokens)


RIGHT = solution(
    "p1/right",
    1.0,
    "    return| a| +| b|\n",
    [
        (0.5, 0.5, 0.0, 0.1),
        (1.0, 0.5, 0.0, 0.2),
        (2.0, 0.9, 0.4, 1.5),
        (1.0, 0.8, -0.1, 0.1),
        (1.5, 0.9, 0.1, 0.1),
    ],
)
WRONG = solution(
    "p1/wrong",
    0.0,
    "    return| a| -| b|\n",
    [
        (0.5, 0.5, 0.0, 0.1),
        (1.0, 0.5, 0.0, 0.2),
        (0.1, 0.1, -0.4, 2.5),
        (0.5, 0.1, 0.0, 0.1),
        (0.5, 0.1, -0.1, 0.1),
    ],
)
REPORT = TokenReport(
    step=20,
    rows=2,
    problems=(ProblemTokens(prompt="def add(a, b):\n", solutions=(RIGHT, WRONG)),),
    reliability=(ReliabilityBin(count=9, value=0.2, reward=0.1, low=0.02, high=0.4),),
)


@pytest.fixture
def page(tmp_path, browser):
    """A browser with the report of a small run; checks at the end that no request or error followed."""
    run = tmp_path / "run"
    run.mkdir()
    journal = Journal(run / "metrics.jsonl")
    journal.append("run", {"run_id": "1", "name": "small one", "experiment": "weighted_mtp/example"})
    for step in range(0, 30, 10):
        metrics = {"train_loss": 3 / (step + 1), "validation_ce_head_1": 2.0, "validation_ce_head_2": 3.0}
        journal.append("metrics", {"stage": "policy", "step": step, "metrics": metrics})
    critic = {f"critic_{name}": 0.7 for name in ("auc", "auc_low", "auc_high", "bce", "constant_bce")}
    journal.append("metrics", {"stage": "critic", "step": 10, "metrics": critic | {"critic_margin": 0.2}})
    journal.close()
    save_token_report(REPORT, run)
    url = write_report(run).as_uri()
    browser.open(url)
    assert "small one" in browser.shown(("small one", "p1/wrong"), seconds=20)
    yield browser
    assert [each for each in browser.requests if not each.startswith("data:")] == [url]
    assert browser.complaints == []


def test_a_frame_is_found_by_what_it_shows_and_not_by_its_order(tmp_path, browser):
    page = tmp_path / "frames.html"
    page.write_text(
        """<body><script>
          const show = (url) => {
            const frame = document.body.appendChild(document.createElement("iframe"));
            frame.sandbox = "allow-scripts";
            frame.src = url;
          };
          show("data:text/html,another frame");
          show(URL.createObjectURL(new Blob(["the report"], {type: "text/html"})));
        </script>"""
    )

    browser.open(page.as_uri())

    assert browser.shown_in_frame("blob", ("the report",), seconds=20) == "the report"
    assert browser.shown_in_frame("data", ("another frame",), seconds=20) == "another frame"


def middle(page, selector):
    box = page.tell(
        f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
        f"(document.querySelector({selector!r}).getBoundingClientRect())"
    )
    return tuple(box)


def test_curves_and_tokens_are_seen(page):
    shown = page.shown(())

    assert {"✓ correct p1/right, reward 1", "✗ incorrect p1/wrong, reward 0"} <= set(shown.splitlines())
    assert page.tell(
        "[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().height > 50)"
    )
    assert page.tell("document.documentElement.scrollWidth <= innerWidth")


def test_the_switch_changes_what_shades_the_tokens(page):
    shades = []
    for key in ("weight", "value", "change", "loss1", "loss2"):
        page.point(*middle(page, f"input[value={key}]"), click=True)
        shades.append(
            tuple(
                page.tell(
                    "[...document.querySelectorAll('.t')].map(e => getComputedStyle(e).backgroundColor)"
                )
            )
        )
        legends = page.tell("[...document.querySelectorAll('.legend')].filter(e => e.offsetHeight).length")
        assert legends == 1

    assert len(set(shades[:4])) == 4
    assert shades[3] == shades[4]  # head 2 has twice the loss everywhere: the same shares of its largest loss
    assert all(len(set(each)) >= 3 for each in shades)


def test_a_token_shows_its_numbers_when_pointed_at(page):
    page.tell("document.querySelectorAll('.t')[2].scrollIntoView({block: 'center'})")
    assert page.tell("document.getElementById('numbers').hidden")

    page.tell("document.querySelectorAll('.t')[2].id = 'plus'")
    page.point(*middle(page, "#plus"))

    numbers = page.tell("document.getElementById('numbers').innerText")
    assert "weight    2.000" in numbers
    assert "TD error +0.400" in numbers
    assert page.tell("document.getElementById('numbers').offsetHeight") > 20
    page.point(1, 1)
    assert page.tell("document.getElementById('numbers').hidden")


def test_rises_and_falls_are_told_apart_without_colour(page):
    page.point(*middle(page, "input[value=change]"), click=True)

    up, down = page.tell(
        "['.up', '.down'].map(e => getComputedStyle(document.querySelector(e)).textDecorationStyle)"
    )
    assert (up, down) == ("solid", "dashed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(page, scheme):
    page.prefer(scheme)

    for key in ("weight", "change", "loss1"):
        page.point(*middle(page, f"input[value={key}]"), click=True)
        assert page.tell(LEAST_CONTRAST) >= 4.5, key


# The least contrast (WCAG 2.1) between a text and its background, over all texts of the page.
LEAST_CONTRAST = """(() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, below) => below.map((each, i) => i < 3 ? top[i] * top[3] + each * (1 - top[3]) : 1);
  const light = colour => colour.slice(0, 3)
    .map(each => each / 255).map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    const layers = [];
    for (let each = element; each; each = each.parentElement)
      layers.unshift(parse(getComputedStyle(each).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const contrasts = [...document.querySelectorAll("body *")]
    .filter(each => each.checkVisibility() && !["SCRIPT", "STYLE", "title"].includes(each.tagName))
    .filter(each => [...each.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
    .map(each => {
      const style = getComputedStyle(each), back = behind(each);
      const ink = light(over(parse(each.closest("svg") ? style.fill : style.color), back));
      const [low, high] = [ink, light(back)].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    });
  return Math.min(...contrasts);
})()"""
