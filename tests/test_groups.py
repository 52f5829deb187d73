"""python -m pytest tests/test_groups.py

Token groups: their names and algebra, the words of a question, and which tokens of a prompt they are.
"""
import pytest
import world

from groups import EmptyGroup, canonical, name_spans, option_spans, parse_edge, parse_group, token_groups

# ---------------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize("paper, ours", [
    ("Image->Question", ("image", "question")), ("Last->Last", ("last", "last")),
    ("Image Central Object->Question", ("related_patches", "question")),
    ("Image Without Central Object->Question", ("other_patches", "question")),
    ("True Option->Last", ("true_option", "last")), ("Question without Options->Last", ("question_wo_options", "last")),
    ("image -> text:the cup - text:cup", ("image", "text:the cup - text:cup")),
    ("image+last->question", ("image+last", "question")), ("image:question", ("image", "question")),
    ("image>question", ("image", "question")), ("image→text:it: a", ("image", "text:it: a"))])
def test_the_papers_own_edge_names_are_understood(paper, ours):
    assert parse_edge(paper) == ours


def test_hyphens_in_words_are_not_minus_signs():
    assert parse_group("question-text:t-shirt") == [("+", "question"), ("-", "text:t-shirt")]
    assert parse_group("text:t-shirt - text:a+b + last") == [("+", "text:t-shirt"), ("-", "text:a+b"), ("+", "last")]
    assert canonical("Image Without Central Object With Pad") == "image-related_patches"
    assert parse_group("question-image hd patch indice") == [
        ("+", "question"), ("-", "tile_patches"), ("-", "newlines")]


@pytest.mark.parametrize("text", ["image-related_patches", "question - text:t-shirt + last", "text:a-b", "last"])
def test_a_canonical_name_reads_as_the_same_group(text):
    assert canonical(text) == text
    assert parse_group(canonical(text)) == parse_group(text)


def test_a_paper_name_that_is_a_difference_stands_alone():
    for text in ("question-image without central object with pad", "image without central object with pad+last"):
        with pytest.raises(ValueError, match="cannot be combined"):
            parse_group(text)


@pytest.mark.parametrize("text", ["imgae", "image+", "-", "", "image++last", "image->", "question minus last"])
def test_an_unknown_group_is_refused_with_the_legal_ones(text):
    with pytest.raises(ValueError, match="token group"):
        parse_group(text)


@pytest.mark.parametrize("text", ["image", "image->", "->question", "image=>question"])
def test_an_edge_without_two_ends_is_refused(text):
    with pytest.raises(ValueError, match="SOURCE->TARGET|token group"):
        parse_edge(text)


# ---------------------------------------------------------------------------------------------------- words

def words_at(spans, text):
    return {name: s if isinstance(s, str) else [text[a:b] for a, b in s] for name, s in spans.items()}


def test_an_option_is_a_whole_word():
    text = "What clothing item is not black, the shirt or the hat?"
    assert option_spans(["hat", "shirt"], text) == {"shirt": [(37, 42)], "hat": [(50, 53)]}
    assert option_spans(["healthy", "unhealthy"], "Is it unhealthy or healthy?")["healthy"] == [(19, 26)]
    assert "not a word" in option_spans(["phone", "laptop"], "Is it the telephone or the laptop?")["phone"]


def test_the_longer_of_two_overlapping_names_keeps_its_words():
    text = "Which vehicle is white, the train car or the car?"
    assert option_spans(["train car", "car"], text) == {"train car": [(28, 37)], "car": [(45, 48)]}
    assert "not a word" in name_spans(["bed", "bed sheet"], "Where is the bed sheet?")["bed"]


def test_an_option_that_stands_twice_is_the_one_next_to_or():
    text = "Is the person to the right or to the left of the chair on the left side?"
    assert option_spans(["left", "right"], text)["left"] == [(37, 41)]
    assert "more than once" in option_spans(["cup", "red"], "cup or cup or red")["cup"]


def test_a_name_counts_in_the_plural_and_every_time_it_stands():
    text = "Any children, women, knives or boxes?"
    assert words_at(name_spans(["child", "woman", "knife", "box"], text), text) == {
        "child": ["children"], "woman": ["women"], "knife": ["knives"], "box": ["boxes"]}
    assert name_spans(["picture"], "Which side of the picture is the picture on?")["picture"] == [(18, 25), (33, 40)]
    assert words_at(name_spans(["he", "she"], "Is he behind the shed?"), "Is he behind the shed?")["he"] == ["he"]


QUESTION = "Is the t-shirt of the café owner red or dark blue?"


@pytest.fixture(scope="module", params=["llava-1.5", "llava-1.6", "llama3-next"])
def groups(request, model):
    p = model(request.param).prompt(QUESTION, world.picture(90, 60))
    return token_groups(p, true_option="red", false_option="dark blue", objects=["t-shirt", "owner"],
                        boxes=[(10, 10, 40, 30)])


def chars(g, name):
    """What the group's tokens cover of the prompt, spaces aside (several byte tokens may cover one character)."""
    covered = sorted({at for i in g.positions(name) for at in range(*g.prompt.spans[i])})
    return "".join(g.prompt.text[at] for at in covered).replace(" ", "")


def test_text_groups_cover_their_words_and_no_other(groups):
    squeeze = QUESTION.replace(" ", "")
    assert chars(groups, "question") == squeeze
    assert chars(groups, "true_option") == "red"
    assert chars(groups, "false_option") == "darkblue"
    assert chars(groups, "objects") == "t-shirtowner"
    assert chars(groups, "question_wo_options") == squeeze.replace("red", "").replace("darkblue", "")
    assert chars(groups, "text:café OWNER") == "caféowner"
    assert chars(groups, "question - text:t-shirt") == squeeze.replace("t-shirt", "")
    assert groups.positions("last") == [len(groups.prompt) - 1]
    assert "Answerthequestion" in chars(groups, "instruction")


def test_the_groups_of_a_prompt_do_not_overlap_and_the_picture_is_one_block(groups):
    image = groups.positions("image")
    assert image == list(range(image[0], image[-1] + 1))
    assert groups.positions("system") == list(range(image[0]))
    parts = [groups.positions(n) for n in ("system", "image", "question", "instruction", "last")]
    assert len({i for part in parts for i in part}) == sum(map(len, parts))
    patches = [groups.named.get(n, []) for n in ("base_patches", "tile_patches", "newlines")]
    assert sorted(i for part in patches for i in part) == image
    related, other, newlines = (set(groups.named.get(n, ())) for n in ("related_patches", "other_patches", "newlines"))
    assert related | other | newlines == set(image) and not related & other and not (related | other) & newlines


def test_unions_and_differences_are_set_algebra(groups):
    image, related = set(groups.positions("image")), set(groups.positions("related_patches"))
    assert set(groups.positions("image-related_patches")) == image - related
    assert set(groups.positions("question+image")) == image | set(groups.positions("question"))
    with pytest.raises(EmptyGroup, match="no token"):
        groups.positions("image-image")


def test_a_group_this_question_does_not_have_says_why(model):
    groups = token_groups(model("llava-1.5").prompt("Is it red?", world.picture(90, 60)))
    for name, why in [("true_option", "no options"), ("objects", "no object"), ("related_patches", "no annotated box"),
                      ("newlines", "AnyRes"), ("captions", "no token"), ("text:blue", "not whole words")]:
        with pytest.raises(EmptyGroup, match=why):
            groups.positions(name)
    groups = token_groups(model("vicuna").prompt("Is it red?", captions="a red cup. a table."))
    assert chars(groups, "captions") == "aredcup.atable."
    with pytest.raises(EmptyGroup, match="no image"):
        groups.positions("image")


@pytest.mark.parametrize("kwargs, why", [
    ({"question": "Is <image> red?"}, "<image>"), ({"question": "  "}, "empty"), ({"image": None}, "needs an image"),
    ({"question": "word " * 5000}, "the model takes")])
def test_a_prompt_that_cannot_be_made_is_refused(model, kwargs, why):
    with pytest.raises(ValueError, match=why):
        model("llava-1.5").prompt(**{"question": "Is it red?", "image": world.picture(90, 60), **kwargs})
