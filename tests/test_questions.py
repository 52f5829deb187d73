"""python -m pytest tests/test_questions.py

Questions: the paper's CSV files, an own picture and question, the bundled ones; and when an answer is right.
"""
import json

import pytest
from PIL import Image

from harness.flags import Parser
from harness.questions import TASKS, is_right, read_any, read_csv, read_questions, soft_accuracy

HEAD = {"ChooseAttr": "question_id,img_id,question,answer,true option,false option,central object name,captions,"
                      "image_w,image_h,central object w,central object h,central object x,central object y",
        "LogicalObj": "question_id,img_id,question,answer,object1 name,object2 name,image_w,image_h,"
                      "object1 w,object1 h,object1 x,object1 y,object2 w,object2 h,object2 x,object2 y"}
ROW = {"ChooseAttr": '0171,23,"Is the jar, if any, full or empty?",empty,empty,full,jar,a jar. a table.,90,60,'
                     '40,30,20,10',
       "LogicalObj": "0072,24,Is there any grass or mud?,no,grass,mud,90,60,5,6,7,8,-,-,-,-"}


def write(folder, task="ChooseAttr", rows=None, head=None):
    file = folder / f"GQA_val_correct_question_with_choose_{task}.csv"
    file.write_text("\n".join([head or HEAD[task], *(rows or [ROW[task]])]) + "\n", encoding="utf-8")
    return file


def test_a_row_of_the_papers_files_becomes_a_question(tmp_path):
    q, = read_csv(write(tmp_path), images=tmp_path)
    assert (q.id, q.key, q.task) == ("0171", "ChooseAttr/0171", "ChooseAttr")            # leading zeros are kept
    assert q.question == "Is the jar, if any, full or empty?" and q.answer == "empty"
    assert (q.true_option, q.false_option, q.objects) == ("empty", "full", ("jar",))
    assert q.boxes == ((20, 10, 40, 30),) and q.size == (90, 60)                         # x, y, w, h
    assert q.captions == "a jar. a table." and q.image == tmp_path / "23.jpg" and q.where.endswith("line 2")


def test_an_absent_second_object_has_a_name_and_no_box(tmp_path):
    q, = read_csv(write(tmp_path, "LogicalObj"))
    assert q.objects == ("grass", "mud") and q.boxes == ((7, 8, 5, 6),) and q.image is None
    assert q.true_option == q.false_option == ""


def test_a_picture_may_be_a_png(tmp_path):
    Image.new("RGB", (90, 60)).save(tmp_path / "23.png")
    q, = read_csv(write(tmp_path), images=tmp_path)
    assert q.image.name == "23.png" and q.open().size == (90, 60)


def test_a_picture_of_another_size_than_its_boxes_is_refused(tmp_path):
    Image.new("RGB", (91, 60)).save(tmp_path / "23.jpg")
    q, = read_csv(write(tmp_path), images=tmp_path)
    with pytest.raises(ValueError, match="91x60, the boxes are for 90x60"):
        q.open()


@pytest.mark.parametrize("change, words", [
    (lambda r: r.replace("40,30,20,10", "40,3o,20,10"), "line 3, column 'central object h': '3o' is not a number"),
    (lambda r: r.replace("90,60", "nan,60"), "line 3, column 'image_w': 'nan' is not a number"),
    (lambda r: r.replace("40,30,20,10", "-40,30,20,10"), "line 3: the box of central object has a negative size"),
    (lambda r: r.replace("0172", ""), "line 3, column 'question_id': empty"),
    (lambda r: r.replace("0172", "0171"), "line 3: question_id 0171 is already on line 2"),
    (lambda r: r + ",7", "line 3: more fields"), (lambda r: r.rpartition(",")[0], "line 3: fewer fields")])
def test_a_row_that_cannot_be_read_is_named_by_file_line_and_column(tmp_path, change, words):
    file = write(tmp_path, rows=[ROW["ChooseAttr"], change(ROW["ChooseAttr"].replace("0171", "0172"))])
    with pytest.raises(ValueError, match=words) as error:
        read_csv(file)
    assert file.name in str(error.value)
    bad = []
    assert [q.id for q in read_csv(file, bad=bad)] == ["0171"] and len(bad) == 1         # --skip-bad


@pytest.mark.parametrize("column", ["question_id", "img_id", "question", "answer", "false option", "central object h",
                                    "image_h"])
def test_a_missing_column_is_named(tmp_path, column):
    head = ",".join("something" if c == column else c for c in HEAD["ChooseAttr"].split(","))
    file = write(tmp_path, head=head)
    with pytest.raises(ValueError, match=f"has no column '{column}'"):
        read_csv(file)


@pytest.mark.parametrize("data, words", [(b"", "no column"), (HEAD["ChooseAttr"].encode() + b"\n", "has no questions"),
                                         (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
                                         (HEAD["ChooseAttr"].encode() + b'\n"a', "not a CSV file")])
def test_a_file_that_is_no_csv_is_refused(tmp_path, data, words):
    file = tmp_path / "x_y.csv"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        read_csv(file)
    assert "x_y.csv" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.csv: No such file"):
        read_csv(tmp_path / "nowhere.csv")


def test_an_answer_is_right_if_it_is_the_gold_answer_up_to_case_and_outer_space():
    assert is_right(" Left\n", "left") and is_right("no", "no")
    assert not is_right("left.", "left") and not is_right("the left", "left") and not is_right("", "left")


# ---------------------------------------------------------------------------------------------------- from flags

def questions(*argv):
    """The questions that these flags give."""
    parser = Parser("")
    parser.add_shared_flags("out")
    return read_questions(parser.shared(parser.parse_args(list(map(str, argv)))).data)


def test_an_own_picture_and_question_become_a_question(photo):
    q, = questions("--image", photo, "--question", "Is the cup red or blue?", "--answer", "Red",
                   "--options", "blue,red", "--object", "cup", "--box", "1,2,30,40", "--box", "0,0,90,60")
    assert (q.answer, q.true_option, q.false_option, q.options) == ("red", "red", "blue", ())
    assert q.boxes == ((1, 2, 30, 40), (0, 0, 90, 60)) and q.objects == ("cup",) and q.open().size == (90, 60)
    q, = questions("--image", photo, "--question", "Is the cup red or blue?", "--options", "blue,red")
    assert (q.true_option, q.options) == ("", ("blue", "red"))      # it is not known which is right


def test_without_data_and_image_the_bundled_questions_are_asked():
    found = questions()
    assert {q.task: sum(p.task == q.task for p in found) for q in found} == dict.fromkeys(TASKS.values(), 20)
    assert all(q.open().size == q.size and q.captions for q in found)
    assert len(questions("--limit", 3)) == 18


def test_limit_takes_the_first_questions_of_each_file(tmp_path):
    rows = [ROW["ChooseAttr"].replace("0171", f"{i:04d}") for i in range(5)]
    files = [write(tmp_path, rows=rows), write(tmp_path, "LogicalObj")]
    found = questions("--data", *files, "--images", tmp_path, "--limit", 2)
    assert [q.id for q in found] == ["0000", "0001", "0072"]


@pytest.mark.parametrize("argv, words", [
    (["--image", "PHOTO"], "--image needs --question"), (["--question", "Is it?"], "--question needs --image"),
    (["--image", "PHOTO", "--question", "A or B?", "--options", "a"], "give two"),
    (["--image", "PHOTO", "--question", "A or B?", "--options", "a,b", "--answer", "c"], "not one of --options"),
    (["--image", "PHOTO", "--question", "Is it?", "--box", "1,2,3"], "four numbers"),
    (["--image", "PHOTO", "--question", "Is it?", "--box", "1,2,x,3"], "four numbers"),
    (["--image", "PHOTO", "--question", "Is it?", "--box", "80,2,30,3"], "not inside the 90x60"),
    (["--image", "PHOTO", "--question", "Is it?", "--box", "80,2,nan,3"], "not inside the 90x60"),
    (["--image", "nowhere.png", "--question", "Is it?"], "nowhere.png: no such picture"),
    (["--data", "x.csv"], "--images"), (["--data", "x.csv", "--images", "nowhere"], "nowhere: no such folder"),
    (["--data", "x.csv", "--image", "PHOTO"], "cannot be combined")])
def test_flags_that_do_not_go_together_are_named(photo, argv, words):
    with pytest.raises(ValueError, match=words):
        questions(*(photo if a == "PHOTO" else a for a in argv))


def test_the_same_file_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ChooseAttr/0171 twice"):
        questions("--data", write(tmp_path), write(tmp_path), "--images", tmp_path)


# ---------------------------------------------------------------------------------------------------- OK-VQA, A-OKVQA

def test_soft_accuracy_is_vqas():
    """Ten people, n of whom agree: min(1, (n - 1) / 3) weighs n in 10, min(1, n / 3) the rest."""
    for n, wanted in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        people = [{"race", "racing"}] * n + [{"game"}] * (10 - n)
        assert soft_accuracy("Racing.", people, True) == pytest.approx(wanted)
        assert soft_accuracy(" race", people, False) == pytest.approx(min(1, n / 3))


def okvqa(folder):
    (folder / "OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": [
        {"image_id": 7, "question": "What sport is this?", "question_id": 75}]}))
    (folder / "mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [{
        "image_id": 7, "question_id": 75, "answers": [
            {"answer": "race", "raw_answer": "racing"}] * 6 + [{"answer": "sport", "raw_answer": "sports"}] * 4}]}))
    return folder / "OpenEnded_mscoco_val2014_questions.json"


def aokvqa(folder):
    (folder / "aokvqa_v1p0_val.json").write_text(json.dumps([
        {"image_id": 9, "question_id": "a1", "question": "Why?", "direct_answers": ["rain", "rain", "Snow "],
         "difficult_direct_answer": False},
        {"image_id": 9, "question_id": "a2", "question": "How?", "direct_answers": ["x"],
         "difficult_direct_answer": True}]))
    return folder / "aokvqa_v1p0_val.json"


def test_ok_vqas_and_a_okvqas_own_files_are_read(tmp_path):
    q, = read_any(okvqa(tmp_path), tmp_path, None, None)
    assert (q.key, q.image.name, q.answer) == ("OK-VQA/75", "COCO_val2014_000000000007.jpg", "race")
    assert q.right("Racing") and q.right("race.") and q.right("sports") and not q.right("game")
    q, = read_any(aokvqa(tmp_path), tmp_path, None, None)                       # the difficult one is left out
    assert (q.key, q.image.name, q.answer) == ("A-OKVQA/a1", "000000000009.jpg", "rain")
    assert q.right("Rain") and not q.right("snow") and not q.right("sun")


@pytest.mark.parametrize("spoil, words", [
    (lambda f: f.write_text(json.dumps([{"question": "Why?"}])), ["question 1", "format"]),
    (lambda f: f.write_text("[]"), ["no question"]),
    (lambda f: f.write_text(json.dumps({"questions": [{"question_id": 1}]})), ["annotations"])])
def test_vqa_files_of_another_shape_are_named(tmp_path, spoil, words):
    file = aokvqa(tmp_path)
    spoil(file)
    with pytest.raises((ValueError, OSError)) as e:
        read_any(file, tmp_path, None, None)
    assert "aokvqa" in str(e.value) and all(word in str(e.value) for word in words)
