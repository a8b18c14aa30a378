"""A question about an image, with the visual side in Triton Inference Server and everything else here.

usage: python examples/triton_client.py BUNDLE IMAGE QUESTION [--url localhost:8001] [--model flashvlm] [--budget 128]

The server serves what ``flashvlm export-triton BUNDLE`` wrote; the bundle here has tokenizer, embeddings and language
model. Needs tritonclient[grpc]. See docs/triton.md.
"""

from __future__ import annotations

import argparse

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import FlashVLMError, SessionError
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Request
from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.specs import Array, Feeds, Precision, visual_graph_spec


class TritonSession(VisualSession):
    """Runs the visual graph on a server, in the place of a pipeline's own session.

    Args:
        bundle: that the server's model was exported from, or a copy of it.
        url: host and port of the server's gRPC endpoint.
        model: name of the model there.
        text_multiple: text is padded to a multiple of this many tokens. Triton puts only requests of the same length
            together, and what the mask leaves out changes nothing.
    """

    name = "triton"

    def __init__(
        self, bundle: Bundle, url: str = "localhost:8001", model: str = "flashvlm", text_multiple: int = 32
    ) -> None:
        super().__init__(visual_graph_spec(bundle.manifest.dims, Precision.FP32))
        self.bundle, self.url, self.model, self.text_multiple = bundle, url, model, text_multiple

    def _open(self) -> None:
        self._client = triton.InferenceServerClient(self.url)
        try:
            self._read_config()
        except BaseException:
            self._client.close()
            raise

    def _read_config(self) -> None:
        try:
            config = self._client.get_model_config(self.model).config
        except InferenceServerException as error:
            if error.status() == str(grpc.StatusCode.UNAVAILABLE):
                raise SessionError(
                    "the server cannot be reached",
                    received=error.message(),
                    expected=f"the gRPC endpoint of Triton at {self.url}",
                    hint="start it: tritonserver --model-repository=REPO; port 8001 is the one for gRPC",
                ) from error
            raise SessionError(
                "the server does not have this model",
                received=error.message(),
                expected=f"{self.model} at {self.url}",
                hint=f"flashvlm export-triton {self.bundle.path} --output REPO; tritonserver --model-repository=REPO",
            ) from error
        here, there = self.bundle.manifest.source.weights_sha256, config.parameters["weights_sha256"].string_value
        if here != there:
            raise SessionError("the server's model is of another checkpoint", received=there, expected=here)
        (text,) = (tensor for tensor in config.input if tensor.name == "text_embeds")
        is_half = text.data_type == triton.model_config_pb2.TYPE_FP16
        self.spec = visual_graph_spec(self.bundle.manifest.dims, Precision.FP16 if is_half else Precision.FP32)
        self._max_rows = config.max_batch_size  # 0 where a request is never put together with others: no limit

    def _close(self) -> None:
        self._client.close()

    def _run(self, feeds: Feeds) -> VisualOutputs:
        arrays = dict(feeds)
        rows, length = arrays["text_mask"].shape
        padding = -length % self.text_multiple
        arrays["text_embeds"] = np.pad(arrays["text_embeds"], ((0, 0), (0, padding), (0, 0)))
        arrays["text_mask"] = np.pad(arrays["text_mask"], ((0, 0), (0, padding)))
        arrays["keep"] = np.zeros((rows, int(arrays.pop("budget"))), np.bool_)  # its width is the budget
        most = self._max_rows or rows
        parts = [
            # Where there is a limit, every input has a row for each image.
            self._infer(
                {name: array[first : first + most] for name, array in arrays.items()} if most < rows else arrays
            )
            for first in range(0, rows, most)
        ]
        return VisualOutputs(*(np.concatenate(outputs) for outputs in zip(*parts, strict=True)))

    def _infer(self, arrays: Feeds) -> list[Array]:
        """Return the outputs of one request."""
        inputs = []
        for name, array in arrays.items():
            inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        try:
            result = self._client.infer(self.model, inputs)
        except InferenceServerException as error:
            raise SessionError("the server cannot run this request", received=error.message()) from error
        return [result.as_numpy(tensor.name) for tensor in self.spec.outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--model", default="flashvlm")
    parser.add_argument("--budget", type=int, default=128)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    pipeline = Pipeline.open(bundle)
    pipeline.session = TritonSession(bundle, args.url, args.model)
    with pipeline as vlm:
        (prompt,) = vlm.encode([Request([args.image], args.question)], budget=args.budget)
        print(vlm.answer(prompt).text)


if __name__ == "__main__":
    try:
        main()
    except FlashVLMError as error:
        raise SystemExit(f"triton_client.py: {error}") from None
