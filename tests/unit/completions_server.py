"""A server with OpenAI's completions API for an exported model, computed by transformers alone.

    python completions_server.py MODEL

It prints its port. `PUT /faults` sets the faults of the next requests, in the order of arrival: a status,
`hang`, `bare` (an answer without log-probabilities) or `ok` (no fault). `GET /seen` returns the number of
`requests` since then, the largest number of simultaneous requests (`most`), the number of requests that are
`open` now, and the API `keys` of the requests.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HANG_S = 5.0


class Server(ThreadingHTTPServer):
    """The model, and a record of the requests."""

    request_queue_size = 64  # more than clients open at once; further connections are reset

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = model
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.lock, self.computing, self.open = threading.Lock(), threading.Lock(), set()
        self.reset([])

    def reset(self, faults):
        """Set the faults of the next requests, and clear the record of requests."""
        with self.lock:
            self.faults = faults
            self.seen = {"requests": 0, "most": 0, "keys": []}

    def begin(self, key):
        """Record a request and return its fault; None if no fault is left."""
        with self.lock:
            self.open.add(threading.get_ident())
            self.seen["requests"] += 1
            self.seen["most"] = max(self.seen["most"], len(self.open))
            self.seen["keys"] = sorted({*self.seen["keys"], str(key)})
            return self.faults.pop(0) if self.faults else None

    def end(self):
        with self.lock:
            self.open.discard(threading.get_ident())

    @torch.inference_mode()
    def complete(self, asked):
        """Sample token by token; log-probabilities are those of the model, before the temperature."""
        generator = torch.Generator().manual_seed(asked["seed"])
        prompt = self.tokenizer(asked["prompt"])["input_ids"]
        new, logprobs = [], []
        while len(new) < asked["max_tokens"] and new[-1:] != [self.tokenizer.eos_token_id]:
            logits_V = self.model(torch.tensor([[*prompt, *new]])).logits[0, -1].float()
            if asked["temperature"] == 0:
                token = int(logits_V.argmax())
            else:
                chance_V = (logits_V / asked["temperature"]).softmax(-1)
                token = int(torch.multinomial(chance_V, 1, generator=generator))
            new.append(token)
            logprobs.append(float(logits_V.log_softmax(-1)[token]))
        tokens = [self.tokenizer.decode([each]) for each in new]
        return {
            "text": self.tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if new[-1] == self.tokenizer.eos_token_id else "length",
            "logprobs": {"tokens": tokens, "token_logprobs": logprobs},
        }


class Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, {**self.server.seen, "open": len(self.server.open)})

    def content(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self):
        self.server.reset(self.content())
        self.answer(200, {})

    def do_POST(self):
        asked = self.content()
        fault = self.server.begin(self.headers["Authorization"])
        try:
            if fault == "hang":
                time.sleep(HANG_S)
            if fault == "bare":
                self.answer(200, {"choices": [{"text": "1", "finish_reason": "stop"}]})
            elif fault == "401":
                self.answer(401, {"error": {"message": f"fault 401, key {self.headers['Authorization']}"}})
            elif fault not in {None, "ok", "hang"}:
                self.answer(int(fault), {"error": {"message": f"fault {fault}"}})
            elif self.path != "/v1/completions" or asked["model"] != self.server.name:
                self.answer(404, {"error": {"message": f"The model `{asked['model']}` does not exist."}})
            else:
                time.sleep(0.02)  # so that requests overlap
                with self.server.computing:
                    choice = self.server.complete(asked)
                self.answer(200, {"choices": [choice]})
        except BrokenPipeError:
            pass  # the client gave up
        finally:
            self.server.end()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = Server(sys.argv[1])
    print(server.server_port, flush=True)
    server.serve_forever()
