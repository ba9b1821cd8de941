"""What README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_examples_run(example):
    exec(compile(example, str(README), "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
