"""`hf-pcdvq serve` and `transformers serve`, over HTTP on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import click
import pytest
import typer
from command_line import fail, run
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli import transformers as transformers_cli
from transformers.utils.import_utils import is_serve_available

import hf_pcdvq
from hf_pcdvq.publish.loader_stub import add_loader_stub

OURS = [sys.executable, "-m", "hf_pcdvq_cli", "serve"]
# With nothing imported that knows the packed formats.
TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers", "serve"]

needs_server = pytest.mark.skipif(
    not is_serve_available(), reason='needs the packages of a server: pip install "transformers[serving]"'
)


@pytest.fixture(scope="module")
def packed(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=hf_pcdvq.PcdvqConfig())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def completion(command, folder):
    """The text that a server started with this command completes `abc` with."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        body = {"model": str(folder), "prompt": "abc", "max_tokens": 6, "temperature": 0}
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        while True:  # until it listens or has ended; a test that hangs is stopped by whoever runs it
            try:
                with urllib.request.urlopen(request) as response:
                    return json.load(response)["choices"][0]["text"]
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()) from error
            except urllib.error.URLError:
                assert server.poll() is None, server.stdout.read().decode()
                time.sleep(0.2)
    finally:
        server.terminate()
        server.communicate()


@needs_server
def test_served_completions_are_those_of_the_loaded_model(packed):
    add_loader_stub(packed)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    model = AutoModelForCausalLM.from_pretrained(packed)
    inputs = tokenizer("abc", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected
    assert completion([*OURS, str(packed)], packed) == expected
    assert completion([*TRANSFORMERS, str(packed), "--trust-remote-code"], packed) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--no-such-option"), "No such option '--no-such-option'"),
        (("serve", "model", "--port", "abc"), "Invalid value for '--port': 'abc' is not a valid integer"),
        (("serve", "one", "two"), "Got unexpected extra argument (two)"),
        # Raised by Transformers itself while it runs.
        (("chat", "model", "http://localhost:9", "x=1", "top_p"), "Invalid flag format, missing `=` after `top_p`"),
    ],
)
def test_wrong_usage_is_one_line_of_transformers_and_its_exit_code(arguments, message):
    result = fail(2, message, *arguments)
    assert len(result.stderr.rstrip().splitlines()) == 1
    assert f"see `transformers {arguments[0]} --help`" in result.stderr


def test_an_exit_code_of_transformers_is_kept(monkeypatch):
    """No command of Transformers ends with one today, except that of its help."""
    for ended in (typer.Exit(3), click.exceptions.Exit(3)):
        monkeypatch.setattr(transformers_cli.app, "invoke", lambda ctx, ended=ended: (_ for _ in ()).throw(ended))
        assert run("serve").exit_code == 3


@pytest.mark.parametrize("address", ["http://localhost:9", "localhost:9"])
def test_chat_without_a_server_says_how_to_start_one(address):
    fail(1, "hf-pcdvq serve", "chat", "model", address)


class Refuses(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *args):
        pass


def test_chat_with_a_server_that_refuses_says_what_it_answers():
    with HTTPServer(("localhost", 0), Refuses) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://localhost:{server.server_port}"
            result = fail(1, "the server answered with an error: ", "chat", "model", address)
        finally:
            server.shutdown()
            thread.join()
    assert "404" in result.stderr and "no server answers" not in result.stderr
