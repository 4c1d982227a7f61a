"""Metrics as Prometheus reads them."""

from prometheus_client.parser import text_string_to_metric_families

from kilofed.serving.metrics import BOUNDS, Metrics


def samples(metrics: Metrics) -> dict[str, float]:
    content, content_type = metrics.exposition("")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = text_string_to_metric_families(content.decode())
    found = [sample for family in families for sample in family.samples]
    return {"".join([one.name, *(f" {value}" for value in one.labels.values())]): one.value for one in found}


def test_a_histogram_counts_up_to_each_bound() -> None:
    metrics = Metrics()
    for seconds in (0.01, 0.02, 0.02, 999.0):
        metrics.whole.observe(seconds)
    found = samples(metrics)
    assert [found[f"kilofed_request_seconds_bucket {bound}"] for bound in (0.01, 0.025, 0.05)] == [1, 3, 3]
    assert found["kilofed_request_seconds_bucket 300.0"] == 3
    assert found["kilofed_request_seconds_bucket +Inf"] == found["kilofed_request_seconds_count"] == 4
    assert sum(name.startswith("kilofed_request_seconds_bucket") for name in found) == len(BOUNDS) + 1
    assert metrics.mean_seconds == 999.05 / 4
    assert Metrics().mean_seconds == 0


def test_series_keep_their_names() -> None:
    metrics = Metrics()
    metrics.responses.labels("/v1/completions", 200).inc(3)
    metrics.waiting.set_function(lambda: 2)
    found = samples(metrics)
    assert found["kilofed_responses_total /v1/completions 200"] == 3
    assert found["kilofed_waiting_requests"] == 2
    counters = ("prompt_tokens_total", "generated_tokens_total", "cancelled_total", "failed_streams_total")
    assert [found[f"kilofed_{name}"] for name in counters] == [0, 0, 0, 0]
    assert found["kilofed_active_requests"] == 0
    assert found["kilofed_start_time_seconds"] > 1.6e9
    assert found["kilofed_first_piece_seconds_count"] == 0


def test_two_servers_of_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.prompt_tokens.inc(5)
    assert samples(first)["kilofed_prompt_tokens_total"] == 5
    assert samples(second)["kilofed_prompt_tokens_total"] == 0


def test_openmetrics_is_given_where_it_is_accepted() -> None:
    content, content_type = Metrics().exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert content.endswith(b"# EOF\n")
