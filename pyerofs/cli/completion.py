"""``pyerofs completion``: scripts for bash, zsh and fish, generated from the argument parser."""

from __future__ import annotations

import argparse


def completion(args: argparse.Namespace) -> int:
    """Print the script for one shell."""
    from pyerofs.cli.main import build_parser

    print(_SHELLS[args.shell](_grammar(build_parser())), end="")
    return 0


def _grammar(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Each verb and its long and short options."""
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: sorted({word for action in p._actions for word in action.option_strings})
        for name, p in verbs.choices.items()
    }


def _bash(grammar: dict[str, list[str]]) -> str:
    cases = "\n".join(
        f"        {verb}) words='{' '.join(options)}' ;;" for verb, options in grammar.items()
    )
    return f"""\
_pyerofs() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} words=
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '{" ".join(grammar)}' -- "$cur"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    case $cur in
        -*) COMPREPLY=($(compgen -W "$words" -- "$cur")) ;;
        *) COMPREPLY=($(compgen -f -- "$cur")) ;;
    esac
}}
complete -o filenames -F _pyerofs pyerofs
"""


def _zsh(grammar: dict[str, list[str]]) -> str:
    cases = "\n".join(
        f"        {verb}) compadd -- {' '.join(options)} ;;" for verb, options in grammar.items()
    )
    return f"""\
#compdef pyerofs
_pyerofs() {{
    if ((CURRENT == 2)); then
        compadd -- {" ".join(grammar)}
        return
    fi
    if [[ $PREFIX == -* ]]; then
        case $words[2] in
{cases}
        esac
    else
        _files
    fi
}}
compdef _pyerofs pyerofs
"""


def _fish(grammar: dict[str, list[str]]) -> str:
    lines = [f"complete -c pyerofs -n __fish_use_subcommand -f -a '{' '.join(grammar)}'"]
    for verb, options in grammar.items():
        for option in options:
            kind, name = ("l", option[2:]) if option.startswith("--") else ("s", option[1:])
            lines.append(
                f"complete -c pyerofs -n '__fish_seen_subcommand_from {verb}' -{kind} {name}"
            )
    return "\n".join(lines) + "\n"


_SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
