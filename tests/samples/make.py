"""Writes the exposition samples: our own numbers under the names engines and exporters publish."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent

SAMPLES: dict[str, list[tuple[str, str, float]]] = {
    "vllm": [
        ("vllm:num_requests_running", 'engine="0",model_name="qwen3-30b"', 12),
        ("vllm:gpu_cache_usage_perc", 'engine="0",model_name="qwen3-30b"', 0.41),
        ("vllm:prompt_tokens_total", 'engine="0",model_name="qwen3-30b"', 812_000),
        ("vllm:prefix_cache_hits_total", 'engine="0",model_name="qwen3-30b"', 300_000),
        ("vllm:generation_tokens_total", 'engine="0",model_name="qwen3-30b"', 9.1e5),
        ("vllm:num_preemptions_total", 'engine="0",model_name="qwen3-30b"', 4),
        ("vllm:request_success_total", 'engine="0",finished_reason="stop",model_name="qwen3-30b"', 900),
        ("vllm:request_success_total", 'engine="0",finished_reason="length",model_name="qwen3-30b"', 70),
        ("vllm:request_success_total", 'engine="0",finished_reason="abort",model_name="qwen3-30b"', 5),
        ("vllm:request_prefill_time_seconds_sum", 'engine="0",model_name="qwen3-30b"', 210.5),
        ("vllm:request_prefill_time_seconds_count", 'engine="0",model_name="qwen3-30b"', 970),
        ("vllm:request_decode_time_seconds_sum", 'engine="0",model_name="qwen3-30b"', 8200.25),
        ("vllm:spec_decode_num_drafts_total", 'engine="0",model_name="qwen3-30b"', 300_000),
        ("vllm:spec_decode_num_draft_tokens_total", 'engine="0",model_name="qwen3-30b"', 900_000),
        ("vllm:spec_decode_num_accepted_tokens_total", 'engine="0",model_name="qwen3-30b"', 610_000),
    ],
    "sglang": [
        ("sglang:prompt_tokens_total", 'model_name="llama-3.1-8b",tp_rank="0"', 8.1e6),
        ("sglang:generation_tokens_total", 'model_name="llama-3.1-8b",tp_rank="0"', 7.5e6),
        ("sglang:cached_tokens_total", 'cache_source="device",model_name="llama-3.1-8b"', 1.2e6),
        ("sglang:cached_tokens_total", 'cache_source="host",model_name="llama-3.1-8b"', 2.0e5),
        ("sglang:num_requests_total", 'model_name="llama-3.1-8b"', 11_008),
        ("sglang:num_aborted_requests_total", 'model_name="llama-3.1-8b"', 9),
        ("sglang:num_retracted_requests_total", 'model_name="llama-3.1-8b"', 3),
        ("sglang:num_running_reqs", 'model_name="llama-3.1-8b"', 160),
    ],
    "trtllm": [
        ("trtllm_prompt_tokens_total", 'model_name="llama-3.3-70b"', 51_200),
        ("trtllm_prompt_cached_tokens_total", 'model_name="llama-3.3-70b"', 12_800),
        ("trtllm_generation_tokens_total", 'model_name="llama-3.3-70b"', 20_480),
        ("trtllm_request_success_total", 'finished_reason="stop",model_name="llama-3.3-70b"', 200),
        ("trtllm_request_prefill_time_seconds_sum", 'model_name="llama-3.3-70b"', 12.5),
        ("trtllm_request_decode_time_seconds_sum", 'model_name="llama-3.3-70b"', 310.0),
        ("trtllm_num_requests_running", 'model_name="llama-3.3-70b"', 7),
    ],
    "tgi": [
        ("tgi_request_count", "", 540),
        ("tgi_request_success", "", 530),
        ("tgi_request_failure", 'err="overloaded"', 2),
        ("tgi_request_input_length_sum", "", 270_000),
        ("tgi_request_input_length_count", "", 530),
        ("tgi_request_generated_tokens_sum", "", 106_000),
        ("tgi_request_generated_tokens_count", "", 530),
        ("tgi_batch_inference_duration_sum", 'method="prefill"', 41.5),
        ("tgi_batch_inference_duration_sum", 'method="decode"', 902.0),
        ("tgi_batch_current_size", "", 6),
    ],
    "llamacpp": [
        ("llamacpp:prompt_tokens_total", "", 512),
        ("llamacpp:prompt_seconds_total", "", 1.25),
        ("llamacpp:tokens_predicted_total", "", 2048),
        ("llamacpp:tokens_predicted_seconds_total", "", 30.5),
        ("llamacpp:n_decode_total", "", 2100),
        ("llamacpp:requests_processing", "", 1),
        ("llamacpp:requests_deferred", "", 0),
    ],
    "nim": [
        ("num_requests_running", 'model_name="meta/llama-3.1-8b-instruct"', 3),
        ("num_request_max", 'model_name="meta/llama-3.1-8b-instruct"', 256),
        ("prompt_tokens_total", 'model_name="meta/llama-3.1-8b-instruct"', 88_000),
        ("generation_tokens_total", 'model_name="meta/llama-3.1-8b-instruct"', 41_000),
        ("request_success_total", 'finished_reason="stop",model_name="meta/llama-3.1-8b-instruct"', 410),
        ("gpu_cache_usage_perc", 'model_name="meta/llama-3.1-8b-instruct"', 0.2),
        ("gpu_power_usage_watts", 'gpu="0"', 351_000),
        ("gpu_power_limit_watts", 'gpu="0"', 700),
    ],
    "dynamo": [
        (
            "dynamo_frontend_requests_total",
            'endpoint="chat_completions",model="qwen3-30b",status="success"',
            900,
        ),
        ("dynamo_frontend_requests_total", 'endpoint="chat_completions",model="qwen3-30b",status="error"', 8),
        ("dynamo_frontend_input_sequence_tokens_sum", 'model="qwen3-30b"', 810_000),
        ("dynamo_frontend_input_sequence_tokens_count", 'model="qwen3-30b"', 900),
        ("dynamo_frontend_output_sequence_tokens_sum", 'model="qwen3-30b"', 905_000),
        ("dynamo_frontend_output_sequence_tokens_count", 'model="qwen3-30b"', 900),
        ("dynamo_frontend_inflight_requests", 'model="qwen3-30b"', 12),
    ],
    "triton": [
        ("nv_energy_consumption", 'gpu_uuid="GPU-0b8e"', 91_500.25),
        ("nv_gpu_power_usage", 'gpu_uuid="GPU-0b8e"', 301.5),
        ("nv_gpu_utilization", 'gpu_uuid="GPU-0b8e"', 0.83),
        ("nv_inference_request_success", 'model="ensemble",version="1"', 77),
    ],
    "kepler": [
        ("kepler_node_platform_joules_total", 'node_name="n1",source="redfish"', 123_456.789),
        ("kepler_node_cpu_joules_total", 'node_name="n1",zone="package"', 89_234.567),
        ("kepler_node_cpu_joules_total", 'node_name="n1",zone="dram"', 9_034.5),
    ],
}


def main() -> None:
    for name, rows in SAMPLES.items():
        lines = [
            f"{metric}{{{labels}}} {value}" if labels else f"{metric} {value}"
            for metric, labels, value in rows
        ]
        (HERE / f"{name}.prom").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
