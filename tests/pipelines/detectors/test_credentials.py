"""No password and no key of a config reaches a cache, a log or a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.detectors.credentials import masked

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("load_from='https://me:pw@host/a.pth'", "load_from='https://***@host/a.pth'"),
        ("data_root='s3://KEY@bucket/x'", "data_root='s3://***@bucket/x'"),
        ("dict(password='a b', user='me')", "dict(password='***', user='me')"),
        (
            "{'api_key': 'x', \"aws_secret_access_key\": \"y\"}",
            "{'api_key': '***', \"aws_secret_access_key\": \"***\"}",
        ),
        ("WANDB_API_KEY = 'x'", "WANDB_API_KEY = '***'"),
        ("access_key_id='x', hf_token='y', token='z'", "access_key_id='***', hf_token='***', token='***'"),
        (r"password='a\'b', x='y'", "password='***', x='y'"),
        (r'{"password": "a\"b\\", "x": "y"}', '{"password": "***", "x": "y"}'),
        ("git@host and me@host", "git@host and me@host"),
        (
            "tokenizer_name='bert-base-uncased', mask_token='[MASK]'",
            "tokenizer_name='bert-base-uncased', mask_token='[MASK]'",
        ),
        ("checkpoint='torchvision://resnet50'", "checkpoint='torchvision://resnet50'"),
        ("secret=5, key='x'", "secret=5, key='x'"),
        ("account_key='x', sas_token=\"y\"", "account_key='***', sas_token=\"***\""),
        ("AWS_SESSION_TOKEN='x', SLACK_TOKEN='y'", "AWS_SESSION_TOKEN='***', SLACK_TOKEN='***'"),
        ("headers={'Authorization': 'Bearer x'}", "headers={'Authorization': '***'}"),
        ("private_key='x', WANDB_KEY='y'", "private_key='***', WANDB_KEY='***'"),
        ("url='https://host/a.pth?v=1&sig=x%2F&u=2'", "url='https://host/a.pth?v=1&sig=***&u=2'"),
        ("url='https://host/a.pth?token=x'", "url='https://host/a.pth?token=***'"),
        ("url='https://bob:pa/ss@w@host/a.pth'", "url='https://***@host/a.pth'"),
        ("url='http://host:80/a@2x.png'", "url='http://host:80/a@2x.png'"),
        ("url='https://host/a@b:c.png'", "url='https://host/a@b:c.png'"),
        ("key_token='x', prompt_key='y', cls_token='z'", "key_token='x', prompt_key='y', cls_token='z'"),
    ],
)
def test_credentials_are_masked_and_nothing_else(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected


def test_no_file_of_a_cache_or_a_training_holds_a_password(kit: "Kit", work: Path) -> None:
    config = kit.config(channels=8, fc=24)
    config.model.train_cfg.secret_key = "sesame4"  # no part of a model has one, and none minds
    config.storage = {"data_root": "s3://sesame2:sesame3@bucket", "api_key": "sesame1", "odd": "open"}
    config.test_dataloader.dataset.data_root = "s3://sesame2:sesame3@bucket"
    (work / "mine.py").write_text(config.pretty_text)
    view = ("--scale", "96x72", "--proposals", 8, "--targets", "predictions")
    student = kit.save_detector(work / "mine.pth", config)
    kit.run("cache-teacher", "--ckpt", student, "--config", "mine.py", *kit.data, *view, "--out", "c.zarr")
    options = ("--epochs", 1, "--batch-size", 4, "--workers", 0, "--work-dir", work / "w")
    kit.run("train-teacher", "--config", "mine.py", *kit.data, *options)
    recorded = str(open_cache(work / "c.zarr").metadata["teacher"]["config"])
    assert "***@bucket" in recorded
    assert "storage" not in recorded  # it says nothing of how the teacher sees images
    files = [file for folder in ("c.zarr", "w") for file in (work / folder).rglob("*") if file.is_file()]
    assert len(files) > 10
    assert [file for file in files if b"sesame" in file.read_bytes()] == []
