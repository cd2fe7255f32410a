"""Asks whatever the API's description allows, and much that it does not."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from motor_ray.service.keys import Keys
from tests.service.asking import ask
from tests.service.stand_ins import FakeBackend, app_of
from tests.service.test_keys import HASH
from tests.service.test_tomograms_api import ALLOW, finished

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

OPERATIONS = [
    "GET /healthz",
    "GET /readyz",
    "GET /v1/model",
    "POST /v1/slices",
    "POST /v1/slices:batch",
    "POST /v1/tomograms",
    "GET /v1/tomograms/{tomogram_id}",
    "DELETE /v1/tomograms/{tomogram_id}",
    "GET /v1/tomograms/{tomogram_id}/motors.{kind}",
]


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    """The description of an application that takes whatever it is sent."""
    folder = str(tmp_path_factory.mktemp("jobs"))
    finished(folder)
    app = app_of(FakeBackend(), folder, allow=ALLOW, tomograms_waiting=10**6)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def operations(description):
    """Operations by their names."""
    found = [result.ok() for result in description.get_all_operations()]
    return {operation.label: operation for operation in found}


def test_every_operation_is_asked_here(description):
    assert sorted(operations(description)) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_that_is_asked_breaks_the_endpoint_or_its_promises(description, name, mode):
    operation = operations(description)[name]
    if mode == GenerationMode.NEGATIVE and name in ("GET /healthz", "GET /readyz"):
        pytest.skip("takes nothing that could be wrong")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=30, database=None, suppress_health_check=list(HealthCheck))
    def asked(case):
        case.call_and_validate(checks=CHECKS)

    asked()


def test_the_description_tells_of_keys_limits_and_problems(backend):
    told = ask(app_of(backend, keys=Keys({"alice": HASH})), "GET", "/openapi.json").json()
    for path, methods in told["paths"].items():
        for operation in methods.values():
            assert operation["summary"]
            if path.startswith("/v1/"):
                assert operation["security"]
                assert {"401", "422", "429", "503"} <= operation["responses"].keys()
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert list(response["content"]) == ["application/problem+json"], (path, status)
