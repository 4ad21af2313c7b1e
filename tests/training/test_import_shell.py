"""Scripts are read as bash runs them, or what is not known is named; bash itself is the oracle."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duetvl.core.errors import ConfigError
from duetvl.migrate.script import options
from duetvl.migrate.shell.run import read_script
from duetvl.migrate.shell.values import Text

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is the reference")
# What a script starts is written out instead: a line's words with \x1f between them, lines with \x1e.
STUB = "python() { printf '\\x1e'; printf '\\x1f%s' \"$@\"; }; torchrun() { python \"$@\"; }; export -f python\n"


def of_bash(text: str) -> list[list[str]]:
    """The words of each program that bash starts, in an empty environment and directory, without arguments."""
    command = ["env", "-i", "PATH=/usr/bin:/bin", "bash", "--norc", "-c", STUB + text]
    found = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    return [line.split("\x1f")[1:] for line in found.stdout.decode().split("\x1e")[1:]]


def of_ours(text: str) -> list[list[Text]]:
    return [[Text(start.program), *start.arguments] for start in read_script(text, {}).starts]


def arguments(text: str, **given: str) -> list[tuple[str, list[str]]]:
    (start,) = read_script(text, given).starts
    return [(name, [word.text for word in words]) for name, words in options(start.arguments)]


# What is followed: the words are bash's.
FOLLOWED = r"""
A='--x 1 --y 2'; python a.py $A
---
A=(--x "1 2"
  # why
 --y 3)
python a.py "${A[@]}" ${A[@]} "${A[*]}" x"${A[@]}"y $A ${#A[@]} ${#A}
---
A=(1 2); A+=(3); A+=x; B+=--z; python a.py --x "${A[@]}" $B
---
A="--x 1"; A+=" --y 2"; python a.py $A
---
A=(a b c); python a.py --x ${A[1]} "${A[2]}" ${A[7]:-d} ${A[0]%a}
---
trap 'echo failed' ERR; bash -c "python a.py --x 1"; CMD="python b.py --y 2"; echo $CMD > /dev/null && eval $CMD; $CMD
---
N=3; python a.py --x $((N * (2 + $N) / 4 % 3)) --y ${N}b
---
N=10; python a.py --x $((N+1)) $((-7/2)) $((-7%2)) $((7/-2)) $((7%-2)) $((1<2)) $((2>=3)) $((1==1)) $((2!=2)) $((+ 5 - -3))
---
python a.py --x ${N:-7} ${M-'8'} "${M-'8'}" "${M-"8"}" ${M:-a b} "${M:-a b}" ${M:+9} "${M:+9}" ${M:-$((1+1))}
---
X=; python a.py --x ${X:-1} ${X-2} "${X:+3}" ${X+4} ${X:-}
---
: ${N:=5 6}; python a.py --x $N "$N"
---
X=path/to/file.tar.gz; python a.py --x ${X%.*} ${X%%.*} ${X#*/} ${X##*/} "${X%.gz}" ${X%nothing} ${#X}
---
X=a.b; Y=*; python a.py --x ${X%"$Y"} ${X#'*'} ${X%.?}
---
python a.py \
  --x 1 \
  --y 2 2>&1 3> /dev/null | cat
---
X="a\
b"
python a.py --x $X 'a\
b' "a\"b\\c\$d\`e\n" a\ b 'c'"d"e $'ab' $"cd"
---
cat <<EOF > /dev/null; TP=2
--x 1 ' " (
 EOF
TP=3
EOF
python a.py --y $TP
---
cat <<-'END' > /dev/null && TP=2
TP=3
	END
TP=4
python a.py --y $TP
---
X=1 # a comment
#X=2
python a.py --x $X#1 # --y
---
export P=5 Q=6; A=1 python a.py --x $P$Q ; export "P=7"; V=P; export $V=8; command export Q=9; python a.py --x $P $Q
---
A="　x y"; python a.py --x $A
---
X=$(case x in x) echo 5;; esac; echo ")" # )
)
Y=2
python a.py --y $Y
---
X=0; TP=1; [ "$X" = 1 ] && TP=2; python a.py --tp $TP
---
X=1; TP=1; [ "$X" = 1 ] && TP=2; python a.py --tp $TP
---
TP=1; [ "${X:-}" = 1 ] && TP=2; python a.py --tp $TP
---
TP=1; [ "${X:-0}" = 1 ] || TP=2; python a.py --tp $TP
---
if [ -z $P ]; then P=5; fi; [ -n "$Q" ] && Q=6; [ -n $R ] && R=7; python a.py --x $P ${Q:-8} $R
---
A=b; if [ "$A" == c ]; then TP=2; elif [[ $A == b* && -n $A ]]; then TP=3; else TP=4; fi; python a.py --tp $TP
---
A=b; if [ ! "$A" != c ]; then TP=2; else TP=4; fi; [[ $A == "b*" ]] && TP=5; test 10 -ge 9 && B=1; python a.py --tp $TP $B
---
TP=1; true && false || TP=2; false && TP=3; ! true || TP=4; python a.py --tp $TP
---
A=bc; case $A in (b*|x) TP=2;; *) TP=3;; esac; case $A in "b*") TP=4;; esac; python a.py --tp $TP
---
TP=1; f() { TP=2; }; function g { local TP=3; U=$1; W=$TP; }; g 7 8; python a.py --x $TP $U $W $#; f; python a.py --x $TP
---
f() { if [ "$1" = a ]; then return; fi; X=$1; }; X=1; f a; f b; python a.py --x $X
---
f() ( X=2 ); X=1; f; (X=3); { X=4; } | cat; echo x | X=5; X=6 & X=7 true; python a.py --x $X; { X=8; }; python a.py --x $X
---
TP=1; while [ $# -gt 0 ]; do case $1 in --tp) TP=$2; shift 2;; *) shift;; esac; done; python a.py --x $TP "$@" $*
---
TP=1; eval "TP=2"; A=TP; eval "$A=3"; python a.py --x $TP
---
set -e; set -o pipefail; trap 'X=2' EXIT; X=1; alias a=b; unset Y; python a.py --x $X ${Y:-3}
---
X=1; Y=$X$X; X=$((X+1)) Y=$Y$X; unset X; python a.py --x ${X:-2} $Y
---
readonly N=3; declare -a A=(1 2); declare B=4; typeset C=5; python a.py --x $N ${A[@]} $B $C
---
echo python a.py --x 1; printf '%s' python b.py --x 1 > /dev/null; python a.py --x 2
---
if false; then python a.py --x 1; else python a.py --x 2; fi
---
exit 0; python a.py --x 1
---
for i in {1..3}; do sleep 0; done; while [ 2 -lt 1 ]; do TP=2; done; until true; do TP=3; done; python a.py --x ${TP:-1}
---
NONE=; for i in $NONE; do TP=2; done; for i; do TP=3; done; for ((i=0;i<3;i++)); do :; done; python a.py --x ${TP:-1}
---
x() { for f in a b; do [ -e /$f ] && return 1; done; }; x; python a.py --x 1
---
(exit 1); [ $# -lt 1 ] && echo none > /dev/null; python a.py --x 1
---
time python a.py --x 1 --y=2
""".split("\n---\n")  # noqa: SIM905, E501  a script reads better as a text

# What is not followed: the reason, and bash's words where it is not refused anyway.
ASKED = [
    ("N=$(nproc)\npython a.py --x $N", "N is the output of a command (line 1)"),
    ("python a.py --x `nproc`", "the output of nproc is not known"),
    ("python a.py --x $N", "N is not set in the script"),
    ("python a.py --x $1", "argument 1 of the script is not known"),
    ("TP=1\n[ \"$X\" = 1 ] && TP=2\npython a.py --tp $TP", "TP depends on a condition that is not known (line 2)"),
    ("TP=1\n[ \"$X\" = 1 ] || TP=2\npython a.py --tp $TP", "TP depends on a condition that is not known (line 2)"),
    ("[[ $X == 1 ]] && TP=2\npython a.py --tp $TP", "TP depends on a condition that is not known (line 1)"),
    ("mkdir -p /tmp && TP=2\npython a.py --tp $TP", "TP depends on a condition that is not known (line 1)"),
    ("TP=1\nif [ -d /none ]; then TP=2; fi\npython a.py --tp $TP",
     "TP depends on a condition that is not known (line 2)"),
    ("if [ -d / ]; then :; elif true; then TP=2; fi\npython a.py --tp $TP",
     "TP depends on a condition that is not known (line 1)"),
    ("case $MODE in lora) TP=1;; *) TP=2;; esac\npython a.py --tp $TP",
     "TP depends on a condition that is not known (line 1)"),
    ("while read l; do TP=$l; done < /dev/null\npython a.py --tp $TP",
     "TP depends on a condition that is not known (line 1)"),
    ("for i in $(seq 2); do TP=$i; done\npython a.py --tp $TP", "TP depends on a condition that is not known (line 1)"),
    ("for i in a b; do if ls /none; then TP=1; break; fi; TP=2; done\npython a.py --tp $TP",
     "TP depends on a condition that is not known (line 1)"),
    ("for ((i=0;i<3;i++)); do TP=$i; done\npython a.py --tp $TP",
     "TP depends on a condition that is not known (line 1)"),
    ("i=0\nwhile [ $i -lt 9 ]; do i=$((i+1)); done\npython a.py --x $i",
     "i depends on a condition that is not known (line 2)"),
    ("for i in 1 2; do [ $i = 2 ] && break; A=\"$A $i\"; done\npython a.py --x $A",
     "A depends on a condition that is not known (line 1)"),
    ("for s in 1 2; do python a.py --seed $s; done", "s takes several values in a loop (line 1)"),
    ("set -- a\nwhile [ $# -gt 0 ]; do TP=$1; break; done\npython a.py --x $TP",
     "TP depends on a condition that is not known (line 2)"),
    ("f() { [ -e /none ] && return; TP=5; }\nTP=1\nf\npython a.py --tp $TP",
     "TP depends on a condition that is not known (line 1)"),
    ("[ 3 -gt 2 -a 1 = 1 ] && TP=3\npython a.py --tp $TP", "TP depends on a condition that is not known (line 1)"),
    ("P=ab\n[[ $P =~ ^a ]] && P=7\npython a.py --x $P", "P depends on a condition that is not known (line 2)"),
    ("TP=1\nsource ./none.sh\npython a.py --tp $TP", "TP may be changed by source ./none.sh (line 2)"),
    ("TP=1\neval \"$(true)\"\npython a.py --tp $TP", "TP may be changed by eval (line 2)"),
    ("N=3\n((N++))\npython a.py --x $N", "N is changed within a sum (line 2)"),
    ("N=3\nM=$((N=5))\npython a.py --x $N", "N is changed within a sum (line 2)"),
    ("N=3\nlet N=N+1\npython a.py --x $N", "N is set by let (line 2)"),
    ("read X <<< 5\npython a.py --x $X", "X is set by read (line 1)"),
    ("printf -v X %d 5\npython a.py --x $X", "X is set by printf (line 1)"),
    ("mapfile -t A < /dev/null\npython a.py --x ${A:-1}", "A is set by mapfile (line 1)"),
    ("A=(1 2)\nA[1]=5\npython a.py --x ${A[@]}", "A has elements that are set one by one (line 2)"),
    ("A=([1]=x)\npython a.py --x ${A[@]}", "A has elements that are set one by one (line 1)"),
    ("declare -i N=3+4\npython a.py --x $N", "N is declared with -i"),
    ("declare -i N\nN=3+4\npython a.py --x $N", "N is declared with -i"),
    ("declare -A M=([a]=1)\npython a.py --x ${M[a]}", "${M[a]} is not read"),
    ("declare -u N=ab\npython a.py --x $N", "N is declared with -u"),
    ("X=abc\npython a.py --x ${X^^}", "${X^^} is not read"),
    ("X=abc\npython a.py --x ${X/b/c}", "${X/b/c} is not read"),
    ("X=abc\npython a.py --x ${X:1}", "${X:1} is not read"),
    ("X=Y Y=1\npython a.py --x ${!X}", "${!X} is not read"),
    ("python a.py --x $'a\\tb'", "$'a\\tb' is not read"),
    ("python a.py --x {1,2}", "{1,2} is not read: braces are not written out"),
    ("python a.py --x {1..3}", "{1..3} is not read: braces are not written out"),
    ("python a.py --x ~/x", "HOME is not set in the script"),
    ("python a.py --x /*", "which files /* names is not known"),
    ("X='/* y'\npython a.py --x $X", "which files /* names is not known"),
    ("python a.py --x <(true)", "<(true) is not read"),
    ("python a.py --x $((1 / 0))", "a sum divides by zero"),
    ("N=2\npython a.py --x $((N * $(nproc)))", "the output of nproc is not known"),
    ("N=a\npython a.py --x $((N + 1))", "N is 'a', no whole number"),
    ("N=08\npython a.py --x $((N))", "N is '08', no whole number"),
    ("N=010\npython a.py --x $((N))", "N is '010', no whole number"),
    ("python a.py --x $((010))", "$((010)) is not read"),
    ("python a.py --x $((0x1F))", "$((0x1F)) is not read"),
    ("python a.py --x $((2**10))", "$((2**10)) is not read"),
    ("python a.py --x $((1<2<3))", "$((1<2<3)) is not read"),
    ("python a.py --x $((1<<4))", "$((1<<4)) is not read"),
    ("python a.py --x $((3>2 && 1))", "$((3>2 && 1)) is not read"),
    ("python a.py --x $((True))", "$((True)) is not read"),
    ("python a.py --x $((1 1))", "$((1 1)) is not read"),
    ("python a.py --x $((9223372036854775807 + 1))", "$((9223372036854775807 + 1)) is not read"),
    ("python a.py --x $((999999999999999999 * 10))", "a sum has numbers beyond the shell's"),
    ("N=1_000\npython a.py --x $((N))", "N is '1_000', no whole number"),
    ("python a.py --x $((2#11))", "$((2#11)) is not read"),
    ("RANDOM=1\npython a.py --x $RANDOM", "$RANDOM is not known"),
]  # fmt: skip

REFUSED = [
    ("IFS=,", "line 1: a changed IFS is not followed"),
    ("declare -n N=A", "line 1: declare -n is not followed"),
    ("X=1\nselect y in 1; do X=2; done", "line 2: select is not followed"),
    ("coproc cat", "line 1: coproc is not followed"),
    ("trap 'X=2' DEBUG", "line 1: trap DEBUG, ERR or RETURN of what changes variables is not followed"),
    ("shopt -s lastpipe", "line 1: shopt lastpipe or expand_aliases is not followed"),
    ("[ -e /none ] && f() { X=1; }\nf", "line 2: f, which is defined under a condition, is not followed"),
    ("[ -e /none ] && set -- a", "line 1: changing the script's arguments under a condition that is not known"),
    ("f() { f; }\nf", "line 1: f, which calls itself more than 50 times, is not followed"),
    ("f() { :; }\n" + "".join(f"f{n}() {{ {f'f{n - 1}; ' * 9} }}\n" for n in range(1, 8)) + "f0() { f; }\nf7",
     "line 2: more than 100000 commands are run"),
    ("case a in a) X=1;& b) X=2;; esac", "line 1: a branch of a case that goes on with the next one"),
    ("readonly N=3\nN=4", "line 2: N is readonly and cannot be assigned"),
    ("if true; then X=1", "line 1: expected 'fi', found ''"),
    ("X=1\nfi", "line 2: 'fi' is not expected here"),
    ("X=(1 2", "line 1: ( is not closed"),
    ("a b) c", "line 1: ') c' is not expected here"),
    ("read \"$NAME\" < /dev/null", "line 1: read with words that are not known is not followed"),
]  # fmt: skip


@needs_bash
@pytest.mark.parametrize("text", FOLLOWED)
def test_what_is_followed_gives_the_words_of_bash(text):
    ours = of_ours(text)
    assert not [word.missing for words in ours for word in words if word.missing]
    assert [[word.text for word in words] for words in ours] == of_bash(text)


@pytest.mark.parametrize(("text", "reason"), ASKED)
def test_what_is_not_known_is_named(text, reason):
    assert [word.missing for words in of_ours(text) for word in words if word.missing] == [reason]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_what_is_not_followed_is_refused_with_its_line(text, reason):
    with pytest.raises(ConfigError) as caught:
        read_script(text, {})
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


def test_given_variables_win():
    assert arguments("N=1\nM=$((N*2))\npython a.py --x $N --y $M", N="4") == [("--x", ["4"]), ("--y", ["8"])]
    text = 'TP=1\n[ "$X" = 1 ] && TP=2\nsource ./none.sh\npython a.py --x $TP'
    assert arguments(text, TP="2") == [("--x", ["2"])]
    assert arguments('TP=1\n[ "$X" = 1 ] && TP=2\npython a.py --x $TP', X="1") == [("--x", ["2"])]


def test_what_the_script_takes_where_nothing_is_given_is_told():
    found = read_script('A="$A x"\n[ -z "$B" ] && B=1\n: ${C:=2}\nD=${D:-3}${E+4}${F:?needed}\nG=1 H=${G:-5}', {})
    assert found.variables.assumed == {
        "A": "empty, where the script adds to it first", "B": "not set, as the script's tests find it",
        "C": "2, which the script takes where it is not set", "D": "3, which the script takes where it is not set",
        "E": "not set, as the script does not set it",
    }  # fmt: skip


def test_the_ascend_toolkit_s_environment_changes_no_value():
    found = read_script("TP=1\nsource /usr/local/Ascend/ascend-toolkit/set_env.sh\n. venv/bin/activate", {})
    assert found.value("TP") == Text("1") and len(found.sourced) == 2


@pytest.mark.parametrize("text", ['A="1', "A='1", "A=(1 2", "A=$(ls", "A=`ls", "A=${B", "A=$((1", "(" * 3 + "'"])
def test_a_quote_without_its_end(text):
    with pytest.raises(ConfigError, match=r"line 1: .* is not closed"):
        read_script(text, {})


# -- any script ------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["1", "2", "$A", '"$B"', "${A:-3}", '"${C:-}"', "$((A + 1))", "x$B", "'$A'", '"a b"', "$C"])
NAMES = st.sampled_from(["A", "B", "C"])
TESTS = st.one_of(
    st.builds('[ "{}" {} "{}" ]'.format, st.sampled_from(["$A", "$B", "$C", "1"]), st.sampled_from(["=", "!="]),
              st.sampled_from(["1", "2", "$B"])),
    st.builds('[ {} "${}" ]'.format, st.sampled_from(["-z", "-n"]), NAMES),
    st.builds("[[ ${} == {}* ]]".format, NAMES, st.sampled_from(["1", "a"])),
    st.sampled_from(["true", "false", "! true", "ls /none 2> /dev/null", "(( A > 1 ))"]),
)  # fmt: skip
COMMANDS = st.recursive(
    st.one_of(
        st.builds("{}={}".format, NAMES, WORDS), st.builds("{}+={}".format, NAMES, WORDS),
        st.builds("export {}={}".format, NAMES, WORDS), st.builds("unset {}".format, NAMES),
        st.builds("{} && {}={}".format, TESTS, NAMES, WORDS), st.builds("{} || {}={}".format, TESTS, NAMES, WORDS),
        st.builds("{}={} true".format, NAMES, WORDS), st.builds("f() {{ {}={}; }}".format, NAMES, WORDS),
        st.sampled_from(["f", "g 1 2", "g() { local A=$1; B=$A$2; }", "break", "continue", "return", "eval A=4"]),
    ),
    lambda inner: st.one_of(
        st.builds("{}\n{}".format, inner, inner), st.builds("( {} )".format, inner),
        st.builds("{{ {}; }}".format, inner), st.builds("{{ {}; }} | cat".format, inner),
        st.builds("if {}; then {}; else {}; fi".format, TESTS, inner, inner),
        st.builds("for {} in 1 2 {}; do {}; done".format, NAMES, WORDS, inner),
        st.builds("case {} in 1) {};; *) {};; esac".format, WORDS, inner, inner),
        st.builds("h() {{ {}\n}}\nh 5".format, inner),
    ),
    max_leaves=8,
)  # fmt: skip


@needs_bash
@settings(max_examples=150, deadline=None)
@given(COMMANDS)
def test_any_script_is_read_as_bash_runs_it_or_asked_for(text):
    """In bash a variable that is not set is empty; where that counts, it is asked for."""
    text = f'A=1\n{text}\npython a.py --a "$A" --b "$B" --c "$C"'
    with suppress(ConfigError):
        ours, bash = of_ours(text), of_bash(text)
        assert len(ours) == len(bash)
        for words, expected in zip(ours, bash, strict=True):
            assert len(words) == len(expected)
            assert all(word.missing or word.text == known for word, known in zip(words, expected, strict=True))


PIECES = st.sampled_from(
    ["A=", "B=", "$A", "${A}", "${B:-", "}", "$((", "))", "$(", ")", "(", "`", '"', "'", "\\", "\n", " ", ";", "|",
     "&", "<<E", ">", "#", "if", "then", "fi", "export", "+=", "python a.py", "--x", "1", "*", "/", "%", "${", "[@]",
     "=", "é", "\r\n", "[[", "]]", "case x in", "esac", "for a in", "do", "done", "f()", "{ ", "!", "$'", "<(", ";;"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    with suppress(ConfigError):
        read_script(text, {})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0\1\2\x1f\r", exclude_categories=["Cs"]), min_size=1), max_size=5
    )
)
def test_quoted_words_come_out_as_they_went_in(words):
    (start,) = read_script(f"python a.py --x {' '.join(map(shlex.quote, words))}", {}).starts
    assert start.arguments == (Text("--x"), *map(Text, words))
