"""The page, and the client of docs/api.md, lose no letter when the replica that writes to them is killed."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from playwright.sync_api import sync_playwright

from tests.e2e.reading import generate, settings, wait_for_letters, wait_until_done, written
from tests.examples import ROOT, examples_of
from tests.scale.cluster import Cluster
from tests.service.serving import Server, wait_until

pytestmark = pytest.mark.ray

NUM_TOKENS = 1500


def text_of(plain: Server) -> str:
    text: str = plain.answer("ROMEO:", max_new_tokens=NUM_TOKENS, seed=7)["text"]
    return text


def kill_the_one_that_writes(cluster: Cluster) -> None:
    (writer,) = [each for each in cluster.replicas if each.metrics().total("requests_running") == 1]
    os.kill(writer.pid, signal.SIGKILL)


def is_writing(cluster: Cluster) -> bool:
    return sum(each.metrics().total("requests_running") for each in cluster.replicas) == 1


def test_the_client_of_the_page_goes_on_at_another_replica(replicas: Cluster, plain: Server) -> None:
    (client,) = [example for example in examples_of(ROOT / "docs" / "api.md") if "def events" in example.code]
    asked = f'{{"prompt": "ROMEO:", "seed": 7, "max_new_tokens": {NUM_TOKENS}}}'
    assert '{"prompt": "ROMEO:\\n", "max_new_tokens": 100}' in client.code
    client = replace(client, code=client.code.replace('{"prompt": "ROMEO:\\n", "max_new_tokens": 100}', asked))
    with ThreadPoolExecutor() as pool:
        printed = pool.submit(client.run, replicas.port)
        wait_until(lambda: is_writing(replicas))
        kill_the_one_that_writes(replicas)
        assert printed.result() == text_of(plain)


def test_the_page_goes_on_at_another_replica(replicas: Cluster, plain: Server, chromium: str) -> None:
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto(f"{replicas.url}/#{settings(max_new_tokens=NUM_TOKENS)}")
        generate(page)
        wait_for_letters(page, 100)
        kill_the_one_that_writes(replicas)
        wait_until_done(page)
        assert written(page) == text_of(plain)
