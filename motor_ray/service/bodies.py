"""Bodies of requests that FastAPI does not read, as the API's description has them."""

from typing import Any

BINARY = {"schema": {"type": "string", "format": "binary"}}


def _body(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "description": description, "content": content}}


IMAGE_BODY = _body(
    "A JPEG, PNG or TIFF file. What it is is told by its content.",
    dict.fromkeys(("image/jpeg", "image/png", "image/tiff", "application/octet-stream"), BINARY),
)

IMAGES_BODY = _body(
    "JPEG, PNG or TIFF files.",
    {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"images": {"type": "array", "minItems": 1, "items": BINARY["schema"]}},
                "required": ["images"],
                "additionalProperties": False,
            }
        }
    },
)

TOMOGRAM_BODY = _body(
    "An MRC file, or the URI of a tomogram below one of the endpoint's own prefixes.",
    {
        "application/octet-stream": BINARY,
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"uri": {"type": "string", "pattern": "^s3://"}},
                "required": ["uri"],
                "additionalProperties": False,
            }
        },
    },
)
