"""Opens folders as somebody does who has transformers alone, in a process where megainter cannot be imported: `python stranger.py IN OUT`.

IN holds a list of what to load and to call (``Asked`` of test_remote_code as dictionaries), OUT gets the list of what came back.
"""

import importlib
import sys
from typing import Any

import torch
import transformers

OURS = ("megainter", "preprocessing", "launcher", "tests")


class Absent:
    """Makes this project's packages look as if they were not installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def answer(asked: dict[str, Any]) -> Any:
    auto = getattr(transformers, asked["auto"])
    loaded = auto.from_pretrained(asked["folder"], trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    with torch.no_grad():
        made = (getattr(loaded, asked["method"]) if asked["method"] else loaded)(*asked["given"], **asked["named"])
    if isinstance(made, torch.Tensor):
        return {"made": made}
    return {name: value for name, value in made.items() if value is not None}


def main() -> None:
    absent = Absent()
    sys.meta_path.insert(0, absent)  # type: ignore[arg-type]
    try:
        importlib.import_module("megainter")
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("megainter is there")
    asked = torch.load(sys.argv[1], weights_only=False)
    answers = [answer(one) for one in asked]

    # megainter comes in beside it: its own classes load the same folder, and both stay what they are
    sys.meta_path.remove(absent)  # type: ignore[arg-type]
    megainter = importlib.import_module("megainter")
    ours = megainter.InterBertForPreTraining.from_pretrained(asked[0]["folder"])
    assert type(ours).__module__ == "megainter.model.interbert"
    assert type(transformers.AutoModelForPreTraining.from_pretrained(asked[0]["folder"])) is type(ours)
    torch.save((answers, dict(ours.state_dict())), sys.argv[2])


if __name__ == "__main__":
    main()
