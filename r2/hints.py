"""Suggestions for unknown keys and options: only names close to the given one. Does not import torch."""

import functools
import math
import re
from collections.abc import Iterable, Mapping

import yaml

from r2.paths import CONFIGS


def unknown_key(key: str, options: list[str], target: str | None = None) -> str:
    """The line for a key of a group, of its option with `_target_` `target`, or of none; `options` are what it has."""
    prefix, dot, name = key.rpartition(".")
    near = [f"{prefix}{dot}{one}" for one in nearest(name, _by_itself(o.removeprefix(prefix + dot) for o in options))]
    said = _did_you_mean(near) if near else _of_another(prefix, name)
    own = " or ".join(f"{prefix}={option}" for option, node in _options(prefix).items() if node["_target_"] == target)
    known = f"known are {', '.join(sorted(options))}" if options else f"{own or f'this {prefix}'} has no keys"
    return f"unknown key {key!r}: {said}{known}"


def unknown_option(group: str, wanted: str, options: list[str]) -> str:
    """The line for an option that a group does not have; an option also has the name of what it calls."""
    words = _by_itself(options)
    called = [(node["_target_"].rpartition(".")[2], option) for option, node in _options(group).items()]
    names = [name for name, _ in called]
    words |= {name: option for name, option in called if names.count(name) == 1}
    return f"unknown {group} {wanted!r}: {_did_you_mean(nearest(wanted, words))}choose from {', '.join(options)}"


def nearest(word: str, words: Mapping[str, str]) -> list[str]:
    """What the nearest of `words` stand for: one, or two that are equally near, or none."""
    ranks: dict[str, float] = {}
    for candidate, meant in words.items():
        ranks[meant] = min(_rank(_plain(word), _plain(candidate)), ranks.get(meant, math.inf))
    best = min(ranks.values(), default=math.inf)
    ties = [meant for meant, rank in ranks.items() if rank == best]
    return ties if best < math.inf and len(ties) <= 2 else []


def _rank(word: str, name: str) -> float:
    """How far `word` is from meaning `name`; infinite if it does not.

    It does with one wrong, missing, added or swapped letter, with two from seven letters on, and so forth; or as the
    beginning of the name, in which one letter may be wrong from five on. Another number is no mistake but something
    else: resnet50 is not meant to be resnet18.
    """
    numbers = [re.findall(r"\d+", text) for text in (word, name)]
    if all(numbers) and numbers[0] != numbers[1]:
        return math.inf
    whole, begun = _mistakes(word, name), _mistakes(word, name[: len(word)])
    near = [float(whole)] if whole <= (len(word) + 1) // 4 else []
    near += [begun + 1.25] if len(word) >= 3 and begun <= (len(word) >= 5) else []  # a whole name goes first
    return min(near, default=math.inf)


def _mistakes(a: str, b: str) -> int:
    """Letters to change, leave out, add or swap with their neighbour (optimal string alignment)."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def _plain(word: str) -> str:
    """Without what people write differently: capitals and signs."""
    return "".join(filter(str.isalnum, word.lower()))


def _by_itself(words: Iterable[str]) -> dict[str, str]:
    return {word: word for word in words}


def _did_you_mean(names: list[str]) -> str:
    return f"did you mean {' or '.join(map(repr, names))}? " if names else ""


def _of_another(group: str, name: str) -> str:
    """Where a key exists that the current option lacks: another option of the group, or another group."""
    have = _keys(group)
    for near in [name] if name in have else nearest(name, _by_itself(have))[:1]:
        said = "it" if near == name else f"did you mean '{group}.{near}'? It"
        return f"{said} is a key of {group}={', '.join(have[near])}; "
    elsewhere = {key: key for other in _groups() for key in _keys(other)}
    meant = [name] if name in elsewhere else nearest(name, elsewhere)
    return _did_you_mean([f"{other}.{key}" for key in meant for other in _groups() if key in _keys(other)])


def _keys(group: str) -> dict[str, list[str]]:
    """The options of a group that have each key."""
    found: dict[str, list[str]] = {}
    for option, node in _options(group).items():
        for key in node.keys() - {"_target_", "defaults"}:
            found.setdefault(key, []).append(option)
    return found


def _groups() -> list[str]:
    return [path.name for path in sorted(CONFIGS.iterdir()) if _options(path.name)]


@functools.cache
def _options(group: str) -> dict[str, dict]:
    """The options of a group that call something, as their files have them."""
    files = sorted((CONFIGS / group).glob("*.yaml")) if group.isidentifier() else []
    nodes = {path.stem: yaml.safe_load(path.read_text()) or {} for path in files}
    return {option: node for option, node in nodes.items() if "_target_" in node}
