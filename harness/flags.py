"""
harness/flags.py - the flags that instruments share, and the frozen settings that they become.

Use     parser = Parser(__doc__)
        parser.add_shared_flags("out/knockout")
        shared = parser.shared(parser.parse_args())        Shared(model=ModelSettings, data=DataSettings, out, seed)
Needs   errors.py, hub.py and questions.py beside it; groups.py
"""
import argparse
import math
import os
import sys
from dataclasses import dataclass, fields

import groups
from groups import NAMES, canonical, parse_edge
from harness import hub
from harness.errors import files_of
from harness.questions import BUNDLED, SIX


@dataclass(frozen=True)
class ModelSettings:
    """The flags that choose a model."""
    name: str = "llava-tiny"
    revision: str | None = None
    vision_tower: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    preprocess: str = "llava"
    offload: str = "auto"
    together: int | None = None                    # questions that go through the layers together


@dataclass(frozen=True)
class DataSettings:
    """The flags that choose questions: either files of them, or one from the command line."""
    data: tuple = ()
    images: str | None = None
    tasks: tuple = ()
    limit: int | None = None
    all: bool = False
    skip_bad: bool = False
    shard: tuple | None = None                     # (i, n): every n-th question, starting at the i-th
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    options: str | None = None
    object: tuple = ()
    box: tuple = ()

    def __post_init__(self):
        given = [name for name in ("image", "question", "answer", "options", "object", "box") if getattr(self, name)]
        if given and self.tasks:
            raise ValueError(f"--tasks selects from question files; it cannot be combined with --{given[0]}")
        if given and self.data:
            raise ValueError(f"--{given[0]} and --data cannot be combined")


@dataclass(frozen=True)
class Shared:
    """What every instrument's settings hold."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings(data=(str(BUNDLED),), images=str(BUNDLED.parent / "images"), limit=20)
    out: str = "out"
    seed: int = 0
    strict: bool = True                            # is a group that your own question lacks an error?


# Where the parts of a prompt stand. A group that is not named here may reach over several of them.
PLACE = {"system": 0, "image": 1, "related_patches": 1, "other_patches": 1, "base_patches": 1, "tile_patches": 1,
         "newlines": 1, "captions": 1, "question": 2, "true_option": 2, "false_option": 2, "options": 2, "objects": 2,
         "question_wo_options": 2, "question_wo_objects": 2, "instruction": 3, "last": 4}
GROUPS = groups.__doc__[groups.__doc__.index("    image "):].rstrip()   # of --list-groups: what each name means
PAPER_EDGES = ("question->last", "image->last", "last->last", "image->question", "related_patches->question",
               "other_patches->question")          # figures 3, 4 and 5; the last two need boxes


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as --help, one-line errors, and the flags that instruments share."""

    groups = ", ".join(NAMES) + ", text:WORDS, a+b or a-b"          # for --help

    def __init__(self, doc, **how):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def error(self, message):
        print(f"error: {' '.join(message.split())} (--help shows the flags)", file=sys.stderr)
        sys.exit(2)

    @staticmethod
    def count(text):
        """argparse type: a whole number from 1."""
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
        return int(text)

    @staticmethod
    def seed(text):
        """argparse type: a whole number that torch takes as a seed."""
        if not text.isdecimal() or int(text) >= 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0, below 2^63")
        return int(text)

    @staticmethod
    def numbers(text):
        """argparse type: whole numbers from 0, separated by commas -> sorted tuple."""
        parts = text.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of heads like 0,3")
        return tuple(sorted(set(map(int, parts))))

    @staticmethod
    def shard(text):
        """argparse type: "I/N" -> (I, N), None for the whole. torchrun sets the default, by RANK and WORLD_SIZE."""
        i, _, n = text.partition("/")
        if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
        return (int(i), int(n)) if int(n) > 1 else None

    @staticmethod
    def size(text):
        """argparse type: a number from 0."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
        return value

    @staticmethod
    def edges(texts):
        """Edges as a user writes them -> tuple of (source, target), canonical names, each once. ValueError: the target
        comes before the source in every prompt, so there is nothing to cut.

        Their order does not depend on how they were given: the paper's first, then by name. So the rows of a run that
        is resumed with the same edges in another order have one order, and are computed together.
        """
        edges = set(map(parse_edge, texts))
        for source, target in edges:
            if PLACE.get(source, 0) > PLACE.get(target, 4):
                raise ValueError(f"{source}->{target}: {target} comes before {source} in the prompt, and a decoder "
                                 "attends only to what came before, so there is no such edge to cut")
        order = {edge: i for i, edge in enumerate(PAPER_EDGES)}
        return tuple(sorted(edges, key=lambda edge: (order.get("->".join(edge), len(order)), edge)))

    @staticmethod
    def group(text):
        """The canonical name of a token group. ValueError lists the legal names."""
        return canonical(text)

    @staticmethod
    def window(model):
        """The window where none is asked for: the paper's 9; 3 for the bundled models, which have 10 layers."""
        return 3 if model in hub.BUNDLED else 9

    def add_model_flags(self):
        group = self.add_argument_group("model")
        group.add_argument("--model", default="llava-tiny", metavar="NAME",
                           help=f"{', '.join([*hub.BUNDLED, *hub.MODELS])}, a hub id or a folder (llava-tiny)")
        group.add_argument("--revision", metavar="REV", help="hub branch, tag or commit (main)")
        group.add_argument("--vision-tower", metavar="NAME",
                           help="folder or hub id, where the checkpoint names another or has none")
        group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
        group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                           help="auto: float32 on a CPU, or if config.json says so (llava-tiny), else float16")
        group.add_argument("--offload", choices=("auto", "off", "cpu", "disk"), default="auto",
                           help="where the decoder's layers wait for their turn: on the device (off), in host memory, "
                                "as the files have them (cpu), in the files (disk); auto: the first that has room")
        group.add_argument("--together", type=self.count, metavar="N",
                           help="how many questions go through a layer before the next is fetched (default: as memory "
                                "allows; one if the layers are on the device)")
        group.add_argument("--preprocess", choices=("llava", "hf"), default="llava",
                           help="pixels as the original LLaVA or transformers")

    def add_data_flags(self):
        group = self.add_argument_group("questions", "without --data and --image: 20 of each task from tiny/val")
        group.add_argument("--data", nargs="+", metavar="FILE", 
                           help="the paper's CSVs; JSON of GQA, OK-VQA, A-OKVQA; a quoted pattern, '*.csv', works, too")
        group.add_argument("--images", metavar="DIR", help="the folder of their pictures, {img_id}.jpg, .jpeg or .png")
        group.add_argument("--tasks", nargs="+", metavar="TASK", help=f"only these tasks, such as {', '.join(SIX[:2])}")
        group.add_argument("--limit", type=self.count, metavar="N", help="the first N questions of each task")
        group.add_argument("--all", action="store_true", help="count questions the model answers wrongly, too")
        group.add_argument("--skip-bad", action="store_true", help="report rows that cannot be used, and continue")
        self.add_shard_flag(group)
        group.add_argument("--image", metavar="FILE", help="your own picture ...")
        group.add_argument("--question", metavar="TEXT", help="... and the question about it")
        group.add_argument("--answer", metavar="TEXT", help="its answer, if known")
        group.add_argument("--options", metavar="A,B", help='both of an "A or B" question; the one in --answer is true')
        group.add_argument("--object", action="append", default=[], metavar="WORDS",
                           help="an object that the question names")
        group.add_argument("--box", action="append", default=[], metavar="X,Y,W,H", help="where an object is, in px")

    def add_shard_flag(self, group):
        rank = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
        try:
            if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
                raise ValueError("one without the other")
            self.shard(rank)
        except (ValueError, argparse.ArgumentTypeError) as e:
            raise ValueError(f"RANK and WORLD_SIZE in the environment, as torchrun sets them, are no shard: {e}") from e
        group.add_argument("--shard", type=self.shard, default=rank, metavar="I/N",
                           help="every N-th question, starting at the I-th (default: all; torchrun sets it)")

    def add_run_flags(self, out):
        self.run = self.add_argument_group("run")
        self.run.add_argument("--out", default=out, metavar="DIR", help=f"folder of the results ({out})")
        self.run.add_argument("--seed", type=self.seed, default=0, metavar="N", help="random seed (default: 0)")

    def add_shared_flags(self, out):
        """Those of the model, the questions and the run; more of the last can follow in self.run."""
        self.add_model_flags()
        self.add_data_flags()
        self.add_run_flags(out)

    def add_cut_flags(self, out, window=""):
        """Those that choose what is cut, and all shared ones: of knockout.py, check.py. window: more on its default."""
        self.cut = self.add_argument_group("what to cut")
        add = self.cut.add_argument
        add("--src", metavar="GROUP", help=f"keys to hide: a token group, {self.groups}")
        add("--tgt", metavar="GROUP", help="the queries they are hidden from: another group")
        add("--edge", nargs="+", action="extend", default=[], metavar="A->B",
            help=f"several edges in one run (default: those of figures 3-5, {', '.join(PAPER_EDGES)};"
                 " the last two need boxes, so for your own question without --box the first four)")
        add("--window", type=self.count, metavar="K", help="layers cut at once (default: 9; 3 for the "
            f"bundled models, which have 10 layers{window})")
        add("--heads", type=self.numbers, metavar="H,H", help="for these heads alone (default: all)")
        add("--subword", choices=("first", "last"), default="first", help="measure the answer's first "
            "token, or its last one, given the others (default: first)")
        add("--max-norm", type=self.size, metavar="X", help="leave patches of a larger feature norm "
            "out of related and other patches (figure 16)")
        add("--paper-spans", action="store_true",
            help="find words as the paper's code does: hat in What")
        self.add_shared_flags(out)

    def edges_of(self, args, default):
        """The edges that these flags choose, as `edges` gives them. default: where they choose none; of it, your own
        question without --box gets the first four, since it has no patch groups. ValueError: one of --src and --tgt."""
        if bool(args.src) != bool(args.tgt):
            raise ValueError("--src and --tgt go together")
        edges = [f"{args.src}->{args.tgt}"] * bool(args.src) + args.edge
        return self.edges(edges or (default if args.box or not args.question else default[:4]))

    def add_experiment_flags(self):
        """Those that knockout.py has besides."""
        add = self.cut.add_argument
        add("--per-head", type=self.count, nargs="?", const=10, default=0, metavar="N",
            help="cut each head of each layer alone, rank them, then cut the first N together (10)")
        add("--control", type=self.count, default=0, metavar="N",
            help="cut N random sources of the same size besides, drawn grey")
        add("--control-of", choices=("source", "target"), default="source",
            help="what of the edge is random (default: source)")
        add("--control-step", type=self.count, metavar="K", help="at every K-th layer (default: at "
            "three layers, since N controls cost N times an edge)")
        add("--measure", choices=("first", "answer", "margin"), default="first",
            help="what is drawn: P(one token), log P(whole answer) per token, or the margin log P(true "
                 "option) - log P(false option); the CSV has all (default: first)")
        self.run.add_argument("--plain", action="store_true",
                              help="a forward pass per layer and edge: slow, same curves")
        self.run.add_argument("--groups", action="store_true", help="show the first question's token groups and stop")
        self.run.add_argument("--list-groups", action="version", version=GROUPS, help="say what each group is")

    def check_experiment(self, args):
        """ValueError: two of these flags do not go together, or --control is too large."""
        if args.per_head and (args.plain or args.control):
            raise ValueError(f"--per-head and {'--plain' if args.plain else '--control'} cannot be combined")
        if args.per_head and args.shard:
            raise ValueError("--per-head ranks the heads of all questions together: it cannot be split into shards")
        self.check_control(args.control)
        if args.per_head and len(args.edge) + bool(args.src) != 1:
            raise ValueError("--per-head ranks heads for one edge: give it with --edge")

    @staticmethod
    def check_control(n):
        """ValueError: --control asks for a number of random sets that nobody waits for."""
        if not 0 <= n <= 1000:
            raise ValueError(f"--control {n}: give a number from 0, 1,000 at most")

    @staticmethod
    def model(args):
        return ModelSettings(args.model, args.revision, args.vision_tower, args.device, args.dtype, args.preprocess,
                             args.offload, args.together)

    def shared(self, args):
        """Parsed flags -> Shared. Without --data and a question of your own, the bundled questions are asked."""
        given = {f.name: getattr(args, f.name) for f in fields(DataSettings)}
        given["data"] = files_of("--data", given["data"] or ())
        given = {name: tuple(value or ()) if name in ("data", "tasks", "object", "box") else value
                 for name, value in given.items()}
        if not any(given[name] for name in ("data", "image", "question", "answer", "options", "object", "box")):
            given |= {"data": (str(BUNDLED),), "images": str(BUNDLED.parent / "images"), "limit": args.limit or 20}
        return self.shared_of(args, **given)

    def shared_of(self, args, **data):
        """Parsed flags of the model and the run, and DataSettings' fields, -> Shared."""
        return Shared(self.model(args), DataSettings(**data), args.out, args.seed)
