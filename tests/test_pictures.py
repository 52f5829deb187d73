"""python -m pytest tests/test_pictures.py

What a picture says of itself, and that it can be read: one scale, curves told apart, words, letters, colour bars.
"""
import numpy as np
import pytest
from PIL import Image

from harness import canvas, photos, plots

FACTS = "model,dtype,subword,heads"
HEAD = f"question_id,task,edge,window,layer,p_base,change_percent,question,prediction,{FACTS}\n"
SAID = "llava-tiny,float32,first,all"
ARROW = "\u2192"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(draw, lines of a CSV, ...) -> the figure that was saved."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, file: figures.append(canvas.finish(fig)))

    def draw(function, text, *how):
        (tmp_path / "x.csv").write_text(text, encoding="utf-8")
        function(tmp_path / "x.csv", tmp_path / "x.png", *how)
        return figures[-1]
    return draw


def knockout_rows(n=10, tasks=("ChooseAttr", "ChooseCat"), edges=("image->question", "related_patches->question"),
                  windows=(3,), facts=SAID, question="Is it red?"):
    return HEAD + "".join(f"{q},{task},{edge},{k},{l},0.9,{-10 * l * (task == tasks[0])},{question},Red,{facts}\n"
                          for task in tasks for q in range(n) for k in windows for edge in edges for l in range(4))


def title(fig):
    return fig.get_suptitle()


def test_a_picture_says_model_dtype_window_heads_token_and_interval(drawn):
    fig = drawn(plots.knockout, knockout_rows())
    for words in ("llava-tiny", "float32", "window 3", "all heads", "the answer's first token", "95 % CI of the mean"):
        assert words in title(fig), words
    assert [ax.get_title() for ax in fig.axes] == ["ChooseAttr (n = 10)", "ChooseCat (n = 10)"]
    fig = drawn(plots.knockout, knockout_rows(n=3, facts='m,bfloat16,last,"0,3"'))
    for words in ("m, bfloat16", "heads 0,3", "the answer's last token", "thin lines: single questions"):
        assert words in title(fig) and "CI" not in title(fig), words


def test_panels_have_one_scale_and_coinciding_curves_their_own_style_and_colour(drawn):
    fig = drawn(plots.knockout, knockout_rows())
    assert len({ax.get_ylim() for ax in fig.axes}) == 1 and fig.axes[0].get_ylim()[0] < -30
    first, second = fig.axes[0].lines[:2]
    assert first.get_ydata().tolist() == second.get_ydata().tolist()            # the same values: still two curves
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(first, look)() != getattr(second, look)(), look
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [f"{name} {ARROW} question"
                                                                  for name in ("image", "related patches")]
    assert canvas.STYLES.count("-") == 1 and len(set(map(str, canvas.STYLES))) >= 6     # gaps in all but the lowest


def test_your_own_question_is_shown_with_its_answer_and_probability(drawn):
    fig = drawn(plots.knockout, knockout_rows(n=1, tasks=("own question",), question="Costs it $5 or $6?"))
    assert title(fig).startswith("Costs it $5 or $6? Red  (P of its first token: 0.9)")
    assert all(not text.get_parse_math() for text in fig.findobj(match=lambda a: hasattr(a, "get_parse_math")))


def test_several_windows_have_a_colour_scale_in_a_panel_for_each_edge(drawn):
    fig = drawn(plots.knockout, knockout_rows(tasks=("ChooseAttr",), edges=("image->last",), windows=(1, 3, 9)))
    ax, bar = fig.axes
    assert ax.get_title() == f"image {ARROW} last (n = 10)" and not fig.legends and "window" not in title(fig)
    assert [t.get_text() for t in bar.get_yticklabels()] == ["1", "3", "9"] and "window" in bar.get_ylabel()
    curves = ax.lines[:3]
    assert len({line.get_color() for line in curves}) == 3 and {line.get_linestyle() for line in curves} == {"-"}


def test_the_lens_names_its_words(drawn):
    kinds = ("answer_lower", "answer_capitalized", "false_lower", "false_capitalized")
    rows = "".join(f"{q},t,{kind},{l},0.1,raw,m,float16\n" for q in range(3) for kind in kinds for l in range(3))
    fig = drawn(plots.lens, "question_id,task,kind,layer,probability,norm,model,dtype\n" + rows)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [
        "answer, lower case", "Answer, capitalised", "false option, lower case", "False option, capitalised"]
    assert "m, float16" in title(fig)


def test_accuracy_and_cost_of_pruning_are_apart(drawn):
    head = "question_id,task,removed_layers,correct,seconds,prefill_flops,image_tokens,model,dtype\n"
    rows = "".join(f"{q},{task},{x},{int(x < 2 or q > 1)},{2 - x / 4},{9 - x},4,m,float32\n"
                   for task in ("A", "B") for q in range(4) for x in range(3))
    fig = drawn(plots.prune, head + rows)
    *tasks, cost = fig.axes
    assert [ax.get_title() for ax in fig.axes] == ["A (n = 4)", "B (n = 4)", "cost of a question"]
    for ax in tasks:
        assert [line.get_ydata().tolist() for line in ax.lines] == [[100, 100, 50]]
    time, flops = (line.get_ydata().tolist() for line in cost.lines)
    assert time == [100, 87.5, 75] and flops == pytest.approx([100, 800 / 9, 700 / 9])
    assert "95 % CI" in title(fig) and "accuracy" in tasks[0].get_ylabel() and "X = 0" in cost.get_ylabel()


def test_norms_have_plain_ticks_and_the_threshold_in_use(drawn):
    rows = "".join(f"{q},t,{100 + i},m,float32\n" for q in range(2) for i in range(288))
    fig = drawn(plots.norms, "question_id,task,norm,model,dtype\n" + rows)
    limit = plots.threshold([100 + i for i in range(288)] * 2)
    assert fig.axes[0].lines[0].get_xdata() == [limit, limit] and f"above {limit:.4g}" in fig.axes[0].get_title()
    fig.canvas.draw()
    assert not any("$" in t.get_text() or "^" in t.get_text() for t in fig.axes[0].get_yticklabels())


def test_where_there_is_a_tint_there_is_a_colour_bar(drawn, monkeypatch):
    rows = "".join(f"1,t,a->b,1,{l},{h},{-l * h},{SAID}\n" for l in range(3) for h in range(2))
    fig = drawn(plots.heads, f"question_id,task,edge,window,layer,head,change_percent,{FACTS}\n{rows}", 2)
    assert "change of P(answer)" in fig.axes[1].get_ylabel() and "llava-tiny" in title(fig)
    fig = drawn(plots.accuracy, "group,questions,accuracy,low,high\nverify/obj,9,0.5,0.2,0.8\n")
    assert fig.axes[1].get_ylabel() == "accuracy, %"
    pictures, boxes, lines = [], np.array([[0.0, 0, 8, 8], [8, 0, 16, 8]]), ("a question", "how")
    monkeypatch.setattr(photos, "save", lambda fig, file: pictures.append(fig))
    photos.patch_words(Image.new("RGB", (16, 8)), lines, boxes, ["red", "blue"], [0.1, 0.9], "x.png")
    photos.words(lines, ["1.", "2."], [["a", "b"]], [[0.2, 0.3]], "x.png")
    for fig in pictures:
        assert "probability" in fig.axes[-1].get_ylabel() and title(fig) == "a question\nhow"


def test_a_long_title_wraps_and_a_letter_without_a_font_is_a_box(drawn):
    fig = drawn(plots.knockout, knockout_rows(n=1, tasks=("own question",), question="Is it this or that " * 12))
    wide = 13 * fig.get_figwidth()
    assert 4 < len(title(fig).splitlines()) < 8 and max(map(len, title(fig).splitlines())) <= wide
    assert canvas.drawable("a\u0378b\x1c\n") == "a\u25a1b \n" and canvas.drawable("caf\u00e9") == "caf\u00e9"
    assert canvas.fonts()[0] == "DejaVu Sans"


def test_of_several_runs_a_title_says_what_is_the_same_in_all(drawn, monkeypatch, tmp_path):
    def run(name, p=0.999, **how):
        (tmp_path / name).mkdir(exist_ok=True)
        text = knockout_rows(n=1, tasks=("own question",), **how).replace(",0.9,", f",{p},")
        (tmp_path / name / "knockout.csv").write_text(text)
        return tmp_path / name / "knockout.csv"

    def both(*files):
        return plots.knockout_figure(list(files))[0]
    one, same, other = run("a"), run("b", facts=SAID.replace("float32", "bfloat16")), run("c", question="Is it blue?")
    assert "Is it red? Red  (P of its first token: 0.999)" in title(both(one, same))
    assert "Is it" not in title(both(one, other)) and "llava-tiny, float32" in title(both(one, other))
    assert "float32" not in title(both(one, same))
    sure, unsure = run("d"), run("e", p=0.5)
    for files in ((sure, unsure), (unsure, sure)):                  # in half of the runs only, whichever is first
        assert "saturated" not in both(*files).axes[0].get_title()
    with pytest.raises(ValueError, match="given twice"):
        both(one, one.parent / "." / ".." / "a" / "knockout.csv")


def test_a_title_names_the_token_that_was_measured_and_none_where_several_were(drawn):
    columns = "logp_per_token_base,logp_per_token_knockout,"
    text = knockout_rows(n=1, tasks=("own question",), facts="m,float32,last,all")
    assert "(P of its last token: 0.9)" in title(drawn(plots.knockout, text))
    lines = [columns + line if i == 0 else "-1,-2," + line for i, line in enumerate(text.splitlines())]
    fig = drawn(plots.knockout, "\n".join(lines) + "\n", "answer")
    assert "token" not in title(fig).splitlines()[-1] and "nats per token" in fig.axes[0].get_ylabel()


def test_odd_sizes_still_make_a_picture(drawn, tmp_path):
    one_layer = "\n".join(line for line in knockout_rows(n=2).splitlines() if ",3,0," in line or "edge" in line) + "\n"
    fig = drawn(plots.knockout, one_layer)
    assert fig.axes[0].get_xticks().tolist() == [0]
    long = drawn(plots.knockout, knockout_rows(n=1, tasks=("own question",), question="\u5341" * 3000))
    assert len(title(long).splitlines()) <= 9 and "..." in title(long)
    with pytest.raises(ValueError, match="layer 1000000000 is not one of a model"):
        drawn(plots.knockout, knockout_rows(n=1).replace(",3,3,", ",3,1000000000,"))
    with pytest.raises(ValueError, match="x.foo: a picture's name ends in"):
        canvas.save(canvas.page(3, 3), tmp_path / "x.foo")


def test_many_lines_in_a_legend_make_the_picture_higher_not_its_panels_lower(drawn):
    few, many = (drawn(plots.knockout, knockout_rows(tasks=("ChooseAttr",), edges=[f"image->text:{i}" for i in some]))
                 for some in (range(2), range(9)))
    heights = []
    for fig in (few, many):
        fig.canvas.draw()
        heights.append(fig.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


@pytest.mark.slow
def test_the_readmes_panel_takes_its_notes_from_the_curves(call, monkeypatch, tmp_path):
    import knockout
    from tiny import panel
    figures = []
    monkeypatch.setattr(canvas, "save", lambda fig, file: figures.append(fig))
    assert call(knockout.main, "--edge", *panel.NOTES, "--tasks", panel.TASK, "--limit", 4, "--out", tmp_path)[0] == 0
    panel.draw(tmp_path / "knockout.csv", "x.svg")
    notes, (_, drawn) = figures[0].axes[0].texts, plots.knockout_figure(tmp_path / "knockout.csv")
    peaks = {edge: min(means) for (_, edge), (_, means, _) in drawn.items()}
    assert len(notes) == 3 and f"{-peaks['image->question']:.0f} % of P(answer)" in notes[0].get_text()
    assert notes[1].get_text().endswith(f": {-peaks['question->last']:.0f} %")
    assert notes[1].xy[1] == pytest.approx(peaks["question->last"])
