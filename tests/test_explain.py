"""python -m pytest tests/test_explain.py

The page of one question: its numbers against the instruments, its text against hostile words, and the page itself in a
headless Chromium. That part is skipped where Chromium or playwright is not installed.
"""
import json
import re
import shutil

import pytest
import torch
import world
from commands import read, refused

import explain
from fork import clean_pass
from groups import token_groups
from knockout import percent, sweep, window
from maps import attention, blocks_of

QUESTION = "Is the cup red or blue?"


def data_of(file):
    """The JSON inside a page."""
    text = file.read_text(encoding="utf-8")
    return json.loads(re.search(r"^const D = (.*);$", text, re.MULTILINE)[1])


@pytest.fixture(scope="module", params=["llava-1.5", "llava-1.6"])
def made(request, checkpoint, tmp_path_factory):
    """(kind, folder of a page, the photo) of a question that no file holds."""
    folder = tmp_path_factory.mktemp("explain")
    world.picture(90, 60).save(folder / "photo.png")
    explain.main(["--model", str(checkpoint(request.param)), "--image", str(folder / "photo.png"), "--question",
                  QUESTION, "--options", "red,blue", "--box", "20,10,40,30", "--object", "cup", "--window", "2",
                  "--control", "3", "--out", str(folder / "out")])
    return request.param, folder / "out", folder / "photo.png"


def test_the_page_asks_for_nothing_and_is_small(made):
    _, folder, _ = made
    text = (folder / "explain.html").read_text(encoding="utf-8")
    assert len(text) < 1e6 and not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\((?!data:)", text)
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "/*DATA*/" not in text and "<!--TITLE-->" not in text


def test_edges_maps_and_attention_are_the_instruments_own(made, model):
    kind, folder, photo = made
    page, m = data_of(folder / "explain.html"), model(kind)
    p = m.prompt(QUESTION, photo)
    g = token_groups(p, options=("red", "blue"), objects=["cup"], boxes=[(20, 10, 40, 30)])
    x, d = m.embed(p), m.decoder
    clean, L = clean_pass(d, x, p.positions), len(d.layers)
    logits = m.prefill(x, p.positions)[0][0]
    token, base = logits.argmax().item(), logits.softmax(-1).max().item()
    assert page["p"] == pytest.approx(base, rel=1e-4) and page["T"] == len(page["tokens"]) >= len(p)
    pairs = [(e["source"], e["target"]) for e in page["edges"]]
    assert ("image", "question") in pairs and ("last", "last") in pairs and ("question", "question") not in pairs
    first = [e for e in page["edges"] if e["target"] == "question"]
    wanted = sweep(d, clean, [(g.positions(e["source"]), g.positions("question")) for e in first], token, 2)
    for e, points in zip(first, wanted, strict=True):
        assert e["p"] == pytest.approx(points, rel=1e-4)
        assert e["change"] == pytest.approx([percent(base, v) for v in points], rel=1e-2, abs=1e-2)
        control = e["control"]
        assert control["n"] == 3 and all(low <= mean <= high for mean, low, high in control["change"])
    blocks = blocks_of(p.slots)
    assert page["maps"]["blocks"] == blocks and page["maps"]["side"] == 1
    found = page["maps"]["targets"]["question"]
    patches = [([p.image.start + i for i in block], g.positions("question")) for block in blocks[:5]]
    for b, points in enumerate(sweep(d, clean, patches, token, 2)):
        mine = [found["change"]["layers"][l][b] for l in range(L)]
        assert mine == pytest.approx([percent(base, v) for v in points], rel=1e-2, abs=1e-2)
    for l in range(L):
        rows = attention(d, clean, l, g.positions("question")).mean(0)
        wanted = [rows[p.image.start + i].item() for i, in blocks]
        assert found["attention"][l] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_a_map_of_one_block_of_the_whole_image_is_the_edge_image_to_question(call, checkpoint, photo, tmp_path):
    code, _, err = call(explain.main, "--model", checkpoint("llava-1.5"), "--image", photo, "--question", QUESTION,
                        "--block", 99, "--window", 2, "--out", tmp_path)
    assert code == 0 and "map of question" in err and "\\x1b" not in err, err     # bars, on one line each
    page = data_of(tmp_path / "explain.html")
    edge = next(e for e in page["edges"] if (e["source"], e["target"]) == ("image", "question"))
    assert len(page["maps"]["blocks"]) == 1
    assert [row[0] for row in page["maps"]["targets"]["question"]["change"]["layers"]] == pytest.approx(
        edge["change"], rel=1e-3, abs=1e-4)


def test_the_csvs_beside_the_page_hold_its_numbers(made):
    _, folder, _ = made
    page = data_of(folder / "explain.html")
    edges = {(r["source"], r["target"], int(r["layer"]), r["random"]): r for r in read(folder / "page_edges.csv")}
    for file in folder.glob("*.csv"):                               # each row says what it was measured with
        assert all(None not in row and row["model"] and row["dtype"] == "float32" for row in read(file)), file
    for e in page["edges"]:
        for l in range(page["L"]):
            row = edges[e["source"], e["target"], l, ""]
            for name in ("change", "logp", "margin"):
                assert float(row[name]) == pytest.approx(e[name][l], rel=1e-5, abs=1e-9)
        for i, l in enumerate(e["control"]["layers"]):
            kinds = ("mean", "lowest", "highest")
            three = [float(edges[e["source"], e["target"], l, kind]["change"]) for kind in kinds]
            assert three == pytest.approx(e["control"]["change"][i], rel=1e-5, abs=1e-9)
    for row in read(folder / "page_map.csv"):
        found, b = page["maps"]["targets"][row["target"]], int(row["block"])
        if row["layer"] == "":
            assert float(row["margin"]) == pytest.approx(found["margin"]["all"][b], rel=1e-5, abs=1e-9)
            continue
        l = int(row["layer"])
        assert float(row["attention"]) == pytest.approx(found["attention"][l][b], rel=1e-5, abs=1e-9)
        assert float(row["margin"]) == pytest.approx(found["margin"]["layers"][l][b], rel=1e-5, abs=1e-9)
    words = read(folder / "page_lens.csv")
    assert len(words) == (page["L"] + 1) * page["T"]
    assert len(read(folder / "page_checks.csv")) == len(page["checks"])
    assert words[-1]["word"] == page["lens"]["words"][page["lens"]["ids"][-1][-1]]
    assert [int(r["layers"]) for r in read(folder / "page_prune.csv")] == [row["layers"] for row in page["prune"]]
    assert all(held is not False for _, _, held in page["checks"])


def test_findings_say_their_numbers_and_hedge_a_probability_near_1(made):
    page = data_of(made[1] / "explain.html")
    edge = next(e for e in page["edges"] if (e["source"], e["target"]) == ("image", "question"))
    key = "margin" if page["p"] > 0.99 else "change"
    l = max(range(page["L"]), key=lambda i: abs(edge[key][i]))
    text = next(t for t in page["findings"] if t.startswith("Cutting the image → the question"))
    assert f"to {edge['p'][l]:.3g}" in text and f"to {page['margin'] + edge['margin'][l]:.2f} nats" in text
    assert "3 random sources of the same size" in text and f": {edge[key][l]:+.2f} " in text
    sure = explain.findings(page | {"p": 0.999})
    assert "see the margin" in sure[0] and "see the margin" not in explain.findings(page | {"p": 0.5})[0]


def test_words_of_a_question_cannot_become_markup(call, checkpoint, photo, tmp_path):
    hostile = "/*DATA*/null <!--TITLE--> Is it </script><img src=x onerror=alert(1)> or <b>&amp;</b> \u2028?"
    code, _, err = call(explain.main, "--model", checkpoint("llava-1.5"), "--image", photo, "--question", hostile,
                        "--out", tmp_path)
    assert code == 0, err
    text = (tmp_path / "explain.html").read_text(encoding="utf-8")
    assert len(re.search("<title>(.*?)</title>", text, re.DOTALL)[1]) < 300
    assert text.count("</script>") == 1 and "<img src=x" not in text
    assert data_of(tmp_path / "explain.html")["question"] == hostile


def test_several_questions_have_a_page_each_and_an_index_and_a_run_is_resumed(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--control", 0, "--out", tmp_path / "out")
    code, stdout, err = call(explain.main, *argv, "--limit", 2)
    assert code == 0 and "2 questions" in stdout, err
    before = (tmp_path / "out" / "ChooseAttr-01" / "explain.html").stat().st_mtime_ns
    assert not (tmp_path / "out" / "ChooseAttr-03").exists()
    code, stdout, err = call(explain.main, *argv)
    assert code == 0 and "3 questions" in stdout, err
    assert (tmp_path / "out" / "ChooseAttr-01" / "explain.html").stat().st_mtime_ns == before
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for link in re.findall(r'href="([^"]+explain.html)"', index):
        assert (tmp_path / "out" / link).exists()
    assert index.count("<li>") == 3 and "Is the lamp on or off?" in index
    assert all(e["control"] is None for e in data_of(tmp_path / "out" / "ChooseAttr-03" / "explain.html")["edges"])


def test_a_run_grows_from_one_question_and_folders_do_not_collide(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--control", 0, "--out", tmp_path / "out")
    assert call(explain.main, *argv, "--limit", 1)[0] == 0
    assert (tmp_path / "out" / "ChooseAttr-01" / "explain.html").exists()
    code, stdout, err = call(explain.main, *argv, "--limit", 2)
    assert code == 0 and "index.html" in stdout, err
    (tmp_path / "out" / "ChooseAttr-01" / "thumbnail.json").unlink()
    refused(call(explain.main, *argv, "--limit", 2), "ChooseAttr-01", "start again")

    class Q:
        def __init__(self, key):
            self.key = key
    names = [explain.folder_of(Q(f"T/{i}")) for i in ("a/b", "a-b", "é", "ü", "x" * 300, "x" * 301, "a")]
    assert len(set(names)) == 7 and max(map(len, names)) <= 80 and names[-1] == "T-a"
    assert explain.folder_of(Q("own question/own"), single=True) == ""


def test_what_has_no_page_is_one_line(call, checkpoint, photo, tmp_path):
    refused(call(explain.main, "--model", checkpoint("vicuna"), "--question", QUESTION, "--out", tmp_path), "text-only")
    own = ("--model", checkpoint("llava-1.5"), "--image", photo, "--out", tmp_path)
    refused(call(explain.main, *own), "--image needs --question")
    refused(call(explain.main, *own, "--question", QUESTION, "--control", -1), "--control")
    refused(call(explain.main, *own, "--question", QUESTION, "--control", 100_000_000), "--control", "1,000")


# ---------------------------------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser to drive")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("Chromium is not installed (apt-get install chromium): the page is not looked at in a browser")
    with playwright.sync_playwright() as p:
        one = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def page(browser, made, request):
    """The page at 1280 px, with what it asked for and complained about."""
    how = getattr(request, "param", {})
    context = browser.new_context(viewport={"width": how.get("width", 1280), "height": 900},
                                  color_scheme=how.get("scheme", "light"))
    tab = context.new_page()
    tab.complaints, tab.requests = [], []
    tab.on("console", lambda line: tab.complaints.append(line.text) if line.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("request", lambda r: tab.requests.append(r.url) if not r.url.startswith(("data:", "blob:")) else None)
    tab.goto((made[1] / "explain.html").as_uri())
    yield tab
    assert not tab.complaints and len(tab.requests) == 1            # the file itself
    context.close()


def shown_table(tab, name):
    return [[cell.strip() for cell in row.split("\t")]
            for row in tab.eval_on_selector(f"#{name}", "t => [...t.rows].map(r => [...r.cells].map(c => c.textContent)"
                                                        ".join('\\t'))")]


@pytest.mark.slow
@pytest.mark.browser
def test_the_slider_moves_curve_map_and_lens_together_and_the_page_shows_the_csvs_numbers(page, made):
    content = data_of(made[1] / "explain.html")
    page.locator("#layer").focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    states = []
    for l in range(content["L"]):
        states.append([page.inner_text("#curve-text"), page.inner_html("#map-cut"), page.inner_html("#map-attention"),
                       page.inner_text("#lens-photo-title"), page.url])
        assert f"layer={l}&" in page.url and f"after layer {l + 1}" in states[-1][3]
        target = page.locator("input[name=map]:checked").get_attribute("value")
        found = content["maps"]["targets"][target]
        measure = page.locator("#measure").input_value()
        for row, change, mass in zip(shown_table(page, "map-table")[1:], found[measure]["layers"][l],
                                     found["attention"][l], strict=True):
            assert float(row[4]) == pytest.approx(change, rel=1e-3, abs=1e-9)
            assert float(row[5]) == pytest.approx(100 * mass, rel=1e-3, abs=1e-9)
        page.keyboard.press("ArrowRight")
    for kind in zip(*states, strict=True):
        assert len(set(kind)) == content["L"]
    page.locator("input[name=source][value=image]").check()
    page.locator("input[name=target][value=last]").check()
    edge = next(e for e in content["edges"] if (e["source"], e["target"]) == ("image", "last"))
    for l, row in enumerate(shown_table(page, "edge-table")[1:]):
        assert [float(v) for v in row[:4]] == pytest.approx(
            [l, edge["change"][l], edge["logp"][l], edge["margin"][l]], rel=1e-3, abs=1e-9)


@pytest.mark.slow
@pytest.mark.browser
def test_the_keyboard_reaches_everything_and_the_address_keeps_the_state(page, made):
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        where = page.evaluate("() => { const e = document.activeElement; return e === document.body ? '' : e.id || "
                              "e.name || e.dataset.csv || e.dataset.token || e.tagName }")
        reached.add(where)
        if where == "" and len(reached) > 5:
            break
        assert where == "" or page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle !== 'none' || "
                                            "document.activeElement.matches('.chip input')")
    assert {"source", "target", "map", "measure", "layer", "everywhere", "map-cut", "map-attention", "SUMMARY", "prune",
            "lens"} <= reached and "0" in reached                   # the first token
    page.locator("#map-cut").focus()
    before = page.inner_text("#patch-text")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#patch-text") != before
    lit = page.eval_on_selector_all(".patch.lit", "nodes => nodes.map(n => n.dataset.block)")
    assert len(lit) == 2 and len(set(lit)) == 1                     # the same patch in both maps
    page.locator("#layer").focus()
    page.keyboard.press("End")
    page.select_option("#measure", "logp")
    page.locator("#tokens button").nth(-2).click()
    address, curve, title = page.url, page.inner_text("#curve-text"), page.inner_text("#lens-title")
    page.goto("about:blank")
    page.requests.clear()
    page.goto(address)
    assert (page.inner_text("#curve-text"), page.inner_text("#lens-title")) == (curve, title)
    assert page.locator("#measure").input_value() == "logp"
    page.goto("about:blank")
    page.requests.clear()
    page.goto(address.partition("#")[0] + "#edge=%E0&map=constructor&layer=1&__proto__=3")       # somebody's typing
    assert "layer=" not in page.inner_text("#curve-text") and page.inner_text("#layer-text").startswith("1 ")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("page", [{"scheme": scheme, "width": width} for scheme in ("light", "dark")
                                  for width in (1280, 360)], indirect=True)
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_screen(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    page.eval_on_selector_all("details", "nodes => nodes.forEach(n => n.open = true)")
    found = axe.Axe().run(page).response["violations"]
    assert not found, json.dumps([(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found], indent=1)
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
@pytest.mark.browser
def test_a_button_saves_the_table_as_csv(page, made, tmp_path):
    with page.expect_download() as download:
        page.locator("button[data-csv=prune]").click()
    download.value.save_as(tmp_path / "prune.csv")
    ours, theirs = read(made[1] / "page_prune.csv"), read(tmp_path / "prune.csv")
    assert [r["answer"] for r in theirs] == [r["answer"] for r in ours]
    page.locator("details").first.evaluate("n => n.open = true")
    with page.expect_download() as download:
        page.locator("button[data-csv=edge]").click()
    download.value.save_as(tmp_path / "edges.csv")
    ours = [r for r in read(made[1] / "page_edges.csv") if not r["random"]]
    theirs = read(tmp_path / "edges.csv")
    assert len(ours) == len(theirs) and torch.tensor([float(r["change"]) for r in theirs]).tolist() == pytest.approx(
        [float(r["change"]) for r in ours], rel=1e-5, abs=1e-9)
    assert window(0, 2, 4) == range(0, 1)
