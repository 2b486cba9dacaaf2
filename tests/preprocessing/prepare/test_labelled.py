"""Labelled texts as other people's files hold them, against the table made of them; what is wrong is counted."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megainter.data.tables.labelled import Example, TaskFacts, answer_accuracy, read_examples, read_task, write_examples
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.prepare.labelled import GLUE, Columns, Options, Source, prepare_examples, split_of
from preprocessing.prepare.labelled_images import ImageOptions
from preprocessing.prepare.splits import Shares
from preprocessing.prepare.vqa_answers import normalise_answer

# Genuine header lines of GLUE's training files, each with one line of the same form.
FILES: dict[Source, tuple[str, str, tuple[str, str], tuple[str, ...], tuple[float, ...]]] = {
    "sst-2": ("sentence\tlabel", "a moving film \t1", ("a moving film", ""), ("1",), (1.0,)),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '0\t7\t8\tHe said "no .\tHe refused .',
        ('He said "no .', "He refused ."),
        ("0",),
        (1.0,),
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "4\t1\t2\tWhy?\tHow?\t1", ("Why?", "How?"), ("1",), (1.0,)),
    "sts-b": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.250",
        ("A plane.", "An air plane."),
        (),
        (4.25,),
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
        "sentence2\tlabel1\tgold_label",
        "0\t3\t3n\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tOne.\tTwo.\tneutral\tneutral",
        ("One.", "Two."),
        ("neutral",),
        (1.0,),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "9\tWhen?\tIn May.\tnot_entailment", ("When?", "In May."), ("not_entailment",), (1.0,)),
    "rte": ("index\tsentence1\tsentence2\tlabel", "1\tRain.\tIt is wet.\tentailment", ("Rain.", "It is wet."), ("entailment",), (1.0,)),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "2\tHe hid it.\tIt was hidden.\t1", ("He hid it.", "It was hidden."), ("1",), (1.0,)),
}


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("source", sorted(FILES))
def test_glue_columns(source: Source, tmp_path: Path) -> None:
    header, line, texts, labels, targets = FILES[source]
    report = prepare_examples(source, [write(tmp_path / "train.tsv", header, line)], tmp_path / "out.parquet")
    examples = read_examples(tmp_path / "out.parquet", "train")
    assert (report.kept, report.dropped) == (1, {})
    example = examples[0]
    assert ((example.text_a, example.text_b), example.labels, example.targets) == (texts, labels, targets)
    layout = GLUE[source]
    assert examples.task == TaskFacts(source, layout.problem, layout.classes, layout.figure)
    assert example.images == ()


def test_cola_has_a_header_in_its_test_alone(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", "gj04\t1\t\tOur friends won't buy this.", "gj04\t0\t*\tThey drank the pub.")
    hidden = write(tmp_path / "test.tsv", "index\tsentence", "0\tBill whistled past the house.")
    prepare_examples("cola", [train, hidden], tmp_path / "out.parquet")
    examples = read_examples(tmp_path / "out.parquet")
    found = [(example.text_a, example.labels, example.split) for example in (examples[row] for row in range(3))]
    assert found == [
        ("Our friends won't buy this.", ("1",), "train"),
        ("They drank the pub.", ("0",), "train"),
        ("Bill whistled past the house.", (), "test"),
    ]


def test_splits_and_kinds_are_in_the_names(tmp_path: Path) -> None:
    names = ("train.tsv", "dev_matched.tsv", "test1.json", "snli_ve_dev.jsonl", "msr_paraphrase_test.txt")
    assert [split_of(Path(name)) for name in names] == ["train", "val", "test", "val", "test"]
    assert split_of(Path("latest.tsv")) == ""
    assert split_of(Path("v2_OpenEnded_mscoco_val2014_questions.json")) == "val"
    header, line, *_ = FILES["mnli"]
    files = [write(tmp_path / f"dev_{kind}.tsv", header, line) for kind in ("matched", "mismatched")]
    prepare_examples("mnli", files, tmp_path / "out.parquet")
    assert read_examples(tmp_path / "out.parquet", "val").column("kinds") == [["matched"], ["mismatched"]]


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    header, line, *_ = FILES["mnli"]
    wrong = [line.replace("\tneutral", "\t-"), line + "\tmore", line.replace("\tneutral", "\tperhaps"), line.replace("One.", "  ")]
    lines = [line] * 300 + wrong
    report = prepare_examples("mnli", [write(tmp_path / "train.tsv", header, *lines)], tmp_path / "out.parquet")
    assert report.kept == 300
    assert report.dropped == {"no gold label": 1, "malformed": 2, "blank text": 1}
    assert report.examples["malformed"] == [
        "303: 13 columns, the header has 12",
        "304: label 'perhaps' is none of entailment, neutral, contradiction",
    ]
    assert json.loads((tmp_path / "out.parquet.report.json").read_text())["kept"] == 300
    with pytest.raises(TooManyBadInputsError, match="2 of 304 examples cannot be used"):
        prepare_examples("mnli", [tmp_path / "train.tsv"], tmp_path / "other.parquet", max_bad=0.001)
    assert not (tmp_path / "other.parquet").exists()


def test_named_columns_and_shares(tmp_path: Path) -> None:
    src = write(tmp_path / "reviews.tsv", "key\tverdict\twords", *(f"r{n}\t{n % 3 + 9}\tfilm number {n}" for n in range(200)))
    columns = Columns("words", None, "verdict", "key")
    prepare_examples("tsv", [src], tmp_path / "out.parquet", options=Options(columns), shares=Shares(0.3, 0.0))
    examples = read_examples(tmp_path / "out.parquet")
    assert examples.task.classes == ("9", "10", "11"), "numbers in the order of numbers"
    assert {examples[row].example_id for row in range(200)} == {f"r{n}" for n in range(200)}
    assert 40 <= len(read_examples(tmp_path / "out.parquet", "val")) <= 80
    prepare_examples("tsv", [src], tmp_path / "numbers.parquet", options=Options(columns, regression=True), split="train")
    assert read_examples(tmp_path / "numbers.parquet", "train")[4].targets == (10.0,)


@pytest.mark.parametrize(
    ("source", "name", "lines", "options", "told"),
    [
        ("rte", "train.tsv", ["a\tb"], None, "has no column 'sentence1', 'sentence2', 'label'"),
        ("rte", "train.tsv", ["index\tsentence1\tsentence2\tlabel"], None, "no examples are left"),
        ("rte", "train.tsv", ["index\tindex"], None, "a column stands twice"),
        ("cola", "train.tsv", ["one\ttwo"], None, "its first line has 2 columns, not 4"),
        ("tsv", "train.tsv", ["a\tb", "x\ty"], None, "tsv needs --text"),
        ("rte", "train.tsv", ["a\tb"], Options(Columns("a")), "no other source takes it"),
        ("rte", "train.tsv", ["a\tb"], Options(images=ImageOptions(least=2)), "rte has no images"),
        ("tsv", "train.tsv", ["a\tb", "x\ty"], Options(Columns("a")), "no example has a label"),
        ("nlvr2", "train.json", ["{}"], Options(images=ImageOptions((Path("a"),))), "leave --annotations out"),
        ("vqa", "train.json", ["[]"], None, "has no questions"),
    ],
)
def test_what_is_refused(source: Source, name: str, lines: list[str], options: Options | None, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        prepare_examples(source, [write(tmp_path / name, *lines)], tmp_path / "out.parquet", options=options)
    assert not (tmp_path / "out.parquet").exists()


def vqa_files(folder: Path) -> tuple[Path, Path]:
    """Three questions; the third answer is given once, so it is no class at two occurrences."""
    questions = [{"image_id": 42, "question": f"What is {n}?", "question_id": 42000 + n} for n in range(3)]
    given = [["Yes."] * 7 + ["no"] * 2 + ["maybe"], ["yes"] * 10, ["the two  dogs"] * 4 + ["2 dogs"] * 5 + ["dont know"]]
    annotations = [
        {
            "question_id": 42000 + n, "image_id": 42, "question_type": "what is", "answer_type": "other",
            "multiple_choice_answer": answers[0], "answers": [{"answer": answer, "answer_id": 1} for answer in answers],
        }
        for n, answers in enumerate(given)
    ]  # fmt: skip
    one = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    two = folder / "v2_mscoco_train2014_annotations.json"
    one.write_text(json.dumps({"info": {}, "questions": questions, "data_subtype": "train2014"}))
    two.write_text(json.dumps({"info": {}, "annotations": annotations}))
    return one, two


def test_vqa_soft_scores_and_classes(tmp_path: Path) -> None:
    questions, annotations = vqa_files(tmp_path)
    prepare_examples("vqa", [questions], tmp_path / "out.parquet", options=Options(images=ImageOptions((annotations,), least=2)))
    examples = read_examples(tmp_path / "out.parquet", "train")
    assert examples.task == TaskFacts("vqa", "multi_label", ("yes",), "vqa_accuracy")
    first, last = examples[0], examples[2]
    assert first.images == ("COCO_train2014_000000000042",)
    assert dict(zip(first.labels, first.targets, strict=True)) == pytest.approx({"yes": 1.0, "no": 2 / 3, "maybe": 1 / 3})
    assert (last.labels, last.counts) == (("2 dogs", "don't know"), (9, 1))
    assert first.kinds == ("answer: other", "question: what is")
    options = ImageOptions((annotations,), targets="official", least=1)
    prepare_examples("vqa", [questions], tmp_path / "more.parquet", options=Options(images=options))
    examples = read_examples(tmp_path / "more.parquet")
    assert examples.task.classes == ("yes", "2 dogs")
    assert examples[0].targets == pytest.approx((1.0, 0.6, 0.3))


def test_the_accuracy_of_an_answer_is_the_mean_over_nine_of_ten() -> None:
    for count in range(11):
        annotators = [True] * count + [False] * (10 - count)
        subsets = [min(sum(nine) / 3, 1.0) for nine in combinations(annotators, 9)]
        assert answer_accuracy(count) == pytest.approx(sum(subsets) / 10, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The Dog", "dog"), ("two", "2"), ("none", "0"), ("it's", "it's"), ("isnt", "isn't"), ("1,000", "1000"), ("yes, sir", "yes sir"),
        ("black/white", "black white"), ("a.m.", "am"), ("3.5", "3.5"), ("  an   apple ", "apple"), ("t-shirt", "t shirt"), ("a", ""),
    ],
)  # fmt: skip
def test_answers_are_compared_without_articles_and_punctuation(answer: str, same: str) -> None:
    assert normalise_answer(answer) == same


def test_nlvr2_has_two_images_and_groups_of_one_sentence(tmp_path: Path) -> None:
    lines = [
        {"identifier": f"dev-850-{pair}-{sentence}", "sentence": f"Sentence {sentence}.", "label": label, "left_url": "x"}
        for pair, sentence, label in ((0, 0, "True"), (1, 0, "False"), (0, 1, "False"))
    ]
    prepare_examples("nlvr2", [write(tmp_path / "dev.json", *map(json.dumps, lines))], tmp_path / "out.parquet")
    examples = read_examples(tmp_path / "out.parquet", "val")
    assert examples.images == 2
    assert examples[1].images == ("dev-850-1-img0", "dev-850-1-img1")
    assert examples.column("group") == ["dev-850-0", "dev-850-0", "dev-850-1"]
    assert examples.task.classes == ("False", "True")
    assert examples.column("labels") == [["True"], ["False"], ["False"]]


def test_snli_ve_takes_the_hypothesis(tmp_path: Path) -> None:
    texts = {"sentence1": "A caption.", "sentence2": "He sleeps."}
    line = {"Flickr30K_ID": "3527926597", "pairID": "3527926597.jpg#4r1c", "gold_label": "contradiction", **texts}
    prepare_examples("snli-ve", [write(tmp_path / "snli_ve_train.jsonl", json.dumps(line))], tmp_path / "out.parquet")
    example = read_examples(tmp_path / "out.parquet", "train")[0]
    assert (example.text_a, example.text_b, example.images, example.labels) == ("He sleeps.", "", ("3527926597",), ("contradiction",))


GOOD = Example("a", "words", "", (), ("0",), (1.0,), split="train")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text_a": ""}, "has no text"), ({"example_id": ""}, "has no id"), ({"images": ("a", "b", "c")}, "at most 2"),
        ({"labels": ("2",)}, "one of the classes"), ({"labels": ("0", "1"), "targets": (1.0, 1.0)}, "one of the classes"),
        ({"targets": (0.5,)}, "one of the classes"), ({"targets": (float("nan"),)}, "not all numbers"),
        ({"counts": (1, 2)}, "2 counts for 1"),
        ({"split": "dev"}, "split 'dev'"),
    ],
)  # fmt: skip
def test_a_table_takes_no_example_that_does_not_fit(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path, task = tmp_path / "out.parquet", TaskFacts("t", "single_label", ("0", "1"), "accuracy")
    with pytest.raises(UsageError, match=told):
        write_examples(path, [Example(**{**vars(GOOD), **changes})], task)
    assert not path.exists()
    write_examples(path, [GOOD], task)
    assert (read_examples(path)[0], read_task(path)) == (GOOD, task)


def test_images_go_with_all_examples_or_none(tmp_path: Path) -> None:
    path, task = tmp_path / "out.parquet", TaskFacts("t", "single_label", ("0",), "accuracy")
    write_examples(path, [GOOD, Example("b", "words", images=("i",), split="train")], task)
    with pytest.raises(UsageError, match="1 have 0, 1 have 1 images"):
        read_examples(path)
    with pytest.raises(UsageError, match="comes twice"):
        write_examples(tmp_path / "twice.parquet", [GOOD, GOOD], task)


def answers_of(question: dict[str, Any], *given: str) -> dict[str, Any]:
    annotation = {"question_type": "is", "answer_type": "yes/no", "multiple_choice_answer": given[0]}
    return question | annotation | {"answers": [{"answer": one, "answer_confidence": "yes"} for one in given]}


def test_lists_of_vqa_cp_tell_the_folder_of_each_image(tmp_path: Path) -> None:
    """Bare lists, whose entries are of training and of validation images; the annotations come as a list as well."""
    asked = [
        {"image_id": 262148, "coco_split": "train2014", "question": "Where is he?", "question_id": 262148000},
        {"image_id": 9, "coco_split": "val2014", "question": "Is it?", "question_id": 9000},
    ]
    src, annotations = tmp_path / "vqacp_v2_train_questions.json", tmp_path / "vqacp_v2_train_annotations.json"
    src.write_text(json.dumps(asked))
    annotations.write_text(" \n" + json.dumps([answers_of(one, *["yes"] * 9, "no") for one in asked], indent=1))
    report = prepare_examples("vqa", [src], tmp_path / "e", options=Options(images=ImageOptions((annotations,), least=1)))
    examples = read_examples(tmp_path / "e", "train")
    assert report.kept == 2
    assert [examples[n].images for n in (0, 1)] == [("COCO_train2014_000000262148",), ("COCO_val2014_000000000009",)]
    assert (examples[1].labels, examples[1].counts, examples.task.figure) == (("yes", "no"), (9, 1), "vqa_accuracy")


# A project's file of questions, and what of its first one: image, labels, soft scores, counts.
LAYOUTS = {
    "albef": (
        [{"question_id": 458752000, "question": "Looking through?", "answer": ["net"] * 8 + ["Net."] + ["a fence"], "dataset": "vqa",
          "image": "train2014/COCO_train2014_000000458752.jpg"}],
        ("train2014/COCO_train2014_000000458752", ("net", "fence"), (1.0, 1 / 3), (9, 1)),
    ),
    "lxmert": (
        [{"question_id": 393225000, "sent": "Looking through?", "label": {"pizza": 0.3, "food": 1}, "img_id": "COCO_val2014_000000393225"}],
        ("COCO_val2014_000000393225", ("food", "pizza"), (1.0, 0.3), ()),
    ),
    "gqa": ({"02930152": {"imageId": "n161313", "question": "Looking through?", "answer": "Yes"}}, ("n161313", ("yes",), (1.0,), ())),
}  # fmt: skip


@pytest.mark.parametrize("project", LAYOUTS)
@pytest.mark.parametrize("labelled", [True, False])
def test_questions_of_other_projects_with_and_without_labels(tmp_path: Path, project: str, labelled: bool) -> None:
    document, (image, labels, targets, counts) = LAYOUTS[project]
    if not labelled:
        entries = document if isinstance(document, list) else document.values()
        bare = [{name: value for name, value in entry.items() if name not in ("answer", "label")} for entry in entries]
        document = bare if isinstance(document, list) else dict(zip(document, bare, strict=True))
    src = tmp_path / f"{project}.json"
    src.write_text(json.dumps(document))
    prepare_examples("vqa", [src], tmp_path / "e", options=Options(images=ImageOptions(least=1)), split="train" if labelled else "test")
    examples = read_examples(tmp_path / "e")
    assert (examples[0].images, examples[0].text_a) == ((image,), "Looking through?")
    assert examples[0].example_id in ("458752000", "393225000", "02930152"), "zeros in front stay"
    assert (examples[0].labels, examples[0].counts) == ((labels, counts) if labelled else ((), ()))
    assert examples[0].targets == pytest.approx(targets if labelled else ())
    assert examples.task.classes == (labels[:1] if labelled else ())
    assert examples.task.figure == ("vqa_accuracy" if counts or not labelled else "soft_accuracy")


@pytest.mark.parametrize("document", [[], {}, [{"sent": "x"}], {"a": {"question": "x"}}, "questions"])
def test_what_is_no_list_of_questions_is_refused(tmp_path: Path, document: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="has no questions"):
        prepare_examples("vqa", [tmp_path / "x.json"], tmp_path / "e")


def test_a_column_with_a_blank_before_its_name_is_shown_with_it(tmp_path: Path) -> None:
    for number, (header, column) in enumerate(((" sentence\tlabel", "sentence"), ("sentence\tlabel ", "label"))):
        (tmp_path / f"{number}_train.tsv").write_text(f"{header}\na film\tgood\n")
        with pytest.raises(UsageError) as error:
            prepare_examples("tsv", [tmp_path / f"{number}_train.tsv"], tmp_path / "e", options=Options(Columns("sentence", None, "label")))
        assert f"has no column {column!r}; its first line has {', '.join(map(repr, header.split(chr(9))))}" in str(error.value)
