"""What tests of command lines share: a question file's rows, reading what was written, and what an error looks like."""
import csv
import re

HEADER = ("question_id,img_id,question,answer,true option,false option,central object name,image_w,image_h,"
          "central object x,central object y,central object w,central object h")
ROWS = ["01,a,Is the cup red or blue?,red,red,blue,cup,90,60,20,10,40,30",
        "02,b,Is the cup full or empty?,full,full,empty,cup,60,90,5,5,30,60",
        "03,a,Is the lamp on or off?,on,on,off,lamp,90,60,0,0,80,50"]


def read(file):
    with open(file, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def refused(result, *words):
    """Exit code 2, nothing on stdout, one "error:" line that has the words (the model's own line and the bar aside)."""
    code, out, err = result
    lines = [line for line in err.replace("\r", "\n").splitlines()
             if line.strip() and not line.startswith("model ") and not re.search(r"\d+/\d+ \[", line)]
    assert (code, out) == (2, ""), (code, out, err)
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    assert len(lines[0]) < 700
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]!r}"
