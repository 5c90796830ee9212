"""The Stack file: every fault is named with file, field, value and remedy, and nothing starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from rowen.cli.main import main
from rowen.cli.stack_config import Stack, StackError, check_stack, load_stack


def write(folder: Path, text: str) -> Path:
    path = folder / "stack.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_printed_defaults_are_a_valid_file(tmp_path: Path) -> None:
    path = write(tmp_path, Stack().as_yaml())
    assert load_stack(path) == Stack()


def test_without_a_file_the_embedded_defaults_hold() -> None:
    assert load_stack(None).model == "embedded"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("servin: {port: 1}", ["stack.yaml:1", "servin", "did you mean serving"]),
        ("serving: {port: 99999}", ["serving.port", "99999", "65535"]),
        ("cores: {accelerator: 1, host: 1}", ["cores", "core 1", "two different cores"]),
        ("redis: mysql://x", ["redis", "mysql://x"]),
        ("- a\n- b", ["stack.yaml", "expected a mapping"]),
        ("a: [", ["stack.yaml", "not YAML"]),
        ("kind: Pod", ["kind", "Pod"]),
    ],
)
def test_a_broken_file_is_refused_with_its_field(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(StackError) as error:
        load_stack(write(tmp_path, text))
    for word in words:
        assert word in str(error.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(StackError) as error:
        load_stack(write(tmp_path, "nonsense: 1\nserving: {port: -1}\n"))
    assert "nonsense" in str(error.value)
    assert "serving.port" in str(error.value)


def test_a_port_in_use_is_refused_by_field_and_number() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        stack = Stack.model_validate({"serving": {"port": port}})
        with pytest.raises(StackError, match=rf"serving\.port: port {port} .* in use"):
            check_stack(stack)


def test_one_port_for_two_parts_is_refused() -> None:
    stack = Stack.model_validate({"serving": {"port": 45011}, "admin": {"port": 45011}})
    with pytest.raises(StackError, match=r"admin\.port: 45011 is also serving\.port"):
        check_stack(stack)


def test_a_fixed_port_cannot_serve_two_dedicated_engines() -> None:
    stack = Stack.model_validate(
        {
            "serving": {"port": 0},
            "scheduler": {"port": 0},
            "admin": {"port": 0},
            "dedicated": {"count": 2, "port": 45012},
        }
    )
    with pytest.raises(StackError, match=r"dedicated\.port: 45012 .* dedicated\.count 2"):
        check_stack(stack)


def test_a_core_that_is_not_ours_is_refused() -> None:
    stack = Stack.model_validate({"cores": {"accelerator": 4000, "host": 0}})
    with pytest.raises(StackError, match=r"cores\.accelerator: core 4000"):
        check_stack(stack)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    stack = Stack.model_validate(
        {"model": str(tmp_path), "serving": {"port": 0}, "scheduler": {"port": 0}}
    )
    with pytest.raises(StackError, match=r"holds no config\.json"):
        check_stack(stack)


def test_a_missing_policy_is_refused(tmp_path: Path) -> None:
    stack = Stack.model_validate({"policy": str(tmp_path / "none.yaml"), "serving": {"port": 0}})
    with pytest.raises(StackError, match=r"policy: .*none\.yaml"):
        check_stack(stack)


def test_up_with_a_broken_file_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", str(write(tmp_path, "kind: Pod"))]) == 2
    assert "kind" in capsys.readouterr().err


def test_print_config_prints_yaml_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "Stack"


def test_status_without_a_running_stack_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--run-dir", str(tmp_path)]) == 2
    assert "nothing runs under" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["up", "--fast"]])
def test_wrong_use_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
