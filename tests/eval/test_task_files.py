"""What task files may run without `--trust`: nothing."""

from pathlib import Path

import pytest

from core.contracts.errors import UserError
from core.harness.task_files import find_code, is_plain_template
from core.harness.tasks import TaskOptions, load_tasks

PLAIN = """\
task: plain
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{[choices[0], choices.b.strip()]}}"
doc_to_target: gold
description: "class: {{subject|replace('_', ' ')|title}}"
fewshot_config: {samples: [{class: 3, use_prompt: yes}]}
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true, hf_evaluate: false}
metadata: {version: 1.0}
"""


def test_a_task_that_only_names_fields_needs_no_flag(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(PLAIN)
    (tmp_path / "no.yaml").write_text("a: [")
    assert find_code(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("process_docs: !function evil.run", "process_docs", "!function evil.run"),
        ("fewshot_config: {samples: !function evil.run}", "samples", "!function evil.run"),
        ("class: evil.Task", "class", "evil.Task"),
        ("use_prompt: 'promptsource:*'", "use_prompt", "promptsource:*"),
        ("dataset_path: ./evil.py", "dataset_path", "./evil.py"),
        ("dataset_path: pandas", "dataset_path", "pandas"),
        ("dataset_kwargs: {trust_remote_code: true}", "trust_remote_code", "true"),
        ("metric_list: [{metric: acc, hf_evaluate: yes}]", "hf_evaluate", "yes"),
        ("metric_list: [{metric: ./evil.py}]", "metric", "./evil.py"),
        ("doc_to_text: '{{x.__class__}}'", "doc_to_text", "{{x.__class__}}"),
        ("x: &a {gen_prefix: '{{lipsum()}}'}", "gen_prefix", "{{lipsum()}}"),
        ("y: !!python/name:os.system", "y", "tag:yaml.org,2002:python/name:os.system"),
    ],
)
def test_what_runs_code_is_named(tmp_path: Path, line: str, key: str, value: str) -> None:
    file = tmp_path / "inner" / "task.yaml"
    file.parent.mkdir()
    file.write_text(f"task: mine\n{line}\n")
    (found,) = find_code(tmp_path)
    assert (found.file, found.key, found.value) == (file, key, value)


def test_included_files_are_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "task.yaml").write_text("include: [_base, ../other]\ntask: mine\n")
    (folder / "_base").write_text("include: task.yaml\n")
    (tmp_path / "other").write_text("process_results: !function evil.run\n")
    (found,) = find_code(folder)
    assert found.key == "process_results"


def test_a_folder_beside_a_script_is_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text("task: mine\ndataset_path: data\n")
    (tmp_path / "data").mkdir()
    assert find_code(tmp_path) == []
    (tmp_path / "data" / "data.py").touch()
    assert len(find_code(tmp_path)) == 1


def test_a_task_of_the_harness_itself_may_be_included(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
    base = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    assert "!function" in base.read_text()
    (tmp_path / "task.yaml").write_text(f"include: {base}\ntask: mine\n")
    assert find_code(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "{{question}}",
        "{{choices[0]}} {{a.b['c']}}",
        "{% if hint %}{{hint.strip()}}{% else %}-{% endif %}",
        "{{choices.index(answer) - 1}} {{text|trim|replace('a', 'b')|length}}",
    ],
)
def test_templates_of_fields_are_plain(text: str) -> None:
    assert is_plain_template(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{''.__class__.__mro__}}",
        "{{''['__class__']}}",
        "{{x|attr('__class__')}}",
        "{{x['_' + '_class_' + '_']()}}",
        "{{cycler.__init__.__globals__.os.popen('id').read()}}",
        "{{x.format(y)}}",
        "{{x|map(attribute='y')|list}}",
        "{{self._TemplateReference__context}}",
        "{% set y = x %}",
        "{% include 'x' %}",
        "{% macro m() %}{% endmacro %}",
        "{{ broken",
        "{{x[a][b].replace(c, d)}}",
        "{{x['_' + '_class_' + '_'].replace(a, b)}}",
        "{{x['_' ~ '_class_' ~ '_']}}",
        "{% for y in x %}{{loop}}{% endfor %}",
    ],
)
def test_other_templates_are_not(text: str) -> None:
    assert not is_plain_template(text)


@pytest.mark.full
def test_no_code_of_a_task_folder_runs_before_it_is_trusted(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    marker = tmp_path / "it-ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef run(docs): return docs\n")
    file = tmp_path / "task.yaml"
    file.write_text("task: mine\ndataset_path: json\nprocess_docs: !function evil.run\n")
    with pytest.raises(UserError) as caught:
        load_tasks(TaskOptions(("mine",), folder=tmp_path))
    assert str(caught.value) == (
        f"{file}: process_docs = '!function evil.run' runs code; --trust allows it"
    )
    assert not marker.exists()
    notes: list[str] = []
    with pytest.raises(UserError, match="cannot be loaded"):  # there are no data
        load_tasks(TaskOptions(("mine",), folder=tmp_path, trust=True), say=notes.append)
    assert notes == [f"note: code runs: {file}: process_docs = '!function evil.run'"]
    assert marker.exists()
