"""Every number that a user can give is finite and within bounds, in every command."""

import click
import pytest

from kdpipe.pipelines.cli import main as cli
from kdpipe.pipelines.cli.options import Assignments, Bytes, Choices, FiniteRange, Place, Scale, Shard, WholeRange

NUMBERS = (WholeRange, FiniteRange, Scale, Bytes, Shard)
# options of other kinds: text, names, paths
OTHERS = (
    *(Place, Assignments, Choices, click.Path, click.Choice),
    *(click.types.StringParamType, click.types.BoolParamType),
)
OPTIONS = {
    f"{command} {option.opts[0]}": option
    for command, found in sorted(cli.cli.commands.items())
    for option in found.params
    if isinstance(option, click.Option)
}
NUMERIC = {
    name: option for name, option in OPTIONS.items() if not isinstance(option.type, OTHERS) and option.name != "views"
}
# whatever bounds an option has, these are beyond them
NEVER = ("nan", "NaN", "inf", "-inf", "1e400", "-1e400", "9" * 400, "9" * 5000, "many", "", "0x10", "1,5", "None", "1e")


def refused(option: click.Option, text: str) -> bool:
    try:
        option.type.convert(text, option, None)
    except click.BadParameter:
        return True
    return False


def test_all_kinds_of_numbers_are_among_the_options() -> None:
    """A new option with a number has to be one of these, which have bounds."""
    assert {"train-student --lr", "cache-teacher --part-size", "inspect --image", "evaluate --scale"} <= NUMERIC.keys()
    for name, option in NUMERIC.items():
        assert isinstance(option.type, NUMBERS), f"{name} takes numbers without bounds: {option.type}"
        if isinstance(option.type, WholeRange | FiniteRange):
            assert option.type.min is not None, name
            assert option.type.max is not None, name


@pytest.mark.parametrize("name", NUMERIC)
def test_what_is_no_number_in_range_is_refused(name: str) -> None:
    option = NUMERIC[name]
    for text in NEVER:
        assert refused(option, text), text
    for text in ("-1", "0"):
        assert refused(option, text) or text in allowed(name), text


def allowed(name: str) -> tuple[str, ...]:
    option = name.split()[-1]
    return {"--image": ("-1", "0"), "--seed": ("0",), "--workers": ("0",), "--ray-gpus": ("0",)}.get(option, ())


@pytest.mark.parametrize("text", ["0x0", "0x96", "128x0", "1x1", "-128x96", "nanxnan", "128x" + "9" * 400, "20001x600"])
def test_sizes_of_pictures(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        Scale().convert(text, None, None)


@pytest.mark.parametrize(
    "text", ["0", "0.3", "0GiB", "-1GiB", "nanGiB", "infGiB", "9" * 400 + "GiB", "2000TiB", "1PiB"]
)
def test_sizes_of_files(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        Bytes().convert(text, None, None)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "1e400", "1e-400", "much"])
def test_rates(text: str) -> None:
    with pytest.raises(click.BadParameter):
        OPTIONS["train-student --lr"].type.convert(text, None, None)


def test_messages_say_what_is_wrong() -> None:
    for name, text, reason in (
        ("train-student --lr", "much", "'much' is not a valid number"),
        ("train-student --lr", "nan", "'nan' is not a finite number"),
        ("train-student --epochs", "1.5", "'1.5' is not a valid integer"),
        ("train-student --epochs", "0", "0 is not in the range 1<=x<="),
    ):
        with pytest.raises(click.BadParameter, match=reason):
            OPTIONS[name].type.convert(text, None, None)


def test_numbers_in_range() -> None:
    for name, text, number in (
        ("train-student --lr", "1e-3", 1e-3),
        ("train-student --epochs", "24", 24),
        ("cache-teacher --proposals", "1000", 1000),
        ("cache-teacher --part-size", "1.5GiB", 3 << 29),
        ("cache-teacher --scale", "1333x800", (1333, 800)),
        ("inspect --image", str(2**62), 2**62),
    ):
        assert OPTIONS[name].type.convert(text, None, None) == number
