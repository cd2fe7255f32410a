"""Forms of several image files."""

import re

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from motor_ray.service.intake import counted, in_time
from motor_ray.service.problems import ProblemError

_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{1,70}")
"""What RFC 2046 lets stand between the parts of a form."""


async def images_of(request: Request, size: int, most: int, bytes_each: int, seconds: float) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a form of `size` bytes.

    Raises ProblemError if it is no form, has other fields, too many or too large files, or takes too long to come.
    """
    async with (
        in_time(size, seconds),
        as_form(counted(request, size, seconds)).form(max_files=most, max_fields=0) as form,
    ):
        parts = form.getlist("images")
        if not parts or len(parts) != len(form.multi_items()):
            raise ProblemError(422, "The form has other fields than 'images', or none of that name")
        images = []
        for number, part in enumerate(parts):
            assert isinstance(part, UploadFile)  # other fields than files were not let in
            if part.size is None or part.size > bytes_each:
                raise ProblemError(413, f"Image {number} has more than the {bytes_each:,} bytes that it may have")
            images.append((part.filename or f"image {number}", await part.read()))
        return images


def as_form(request: Request) -> Request:
    """`request` with nothing of its Content-Type but the boundary. Raises ProblemError if it does not bring a form.

    It could name any of Python's codecs for the files' names, some of which make what is no text, or break.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data":
        raise ProblemError(415, "Several images come as a form: curl -F images=@a.jpg -F images=@b.jpg")
    if not _BOUNDARY.fullmatch(boundary):
        raise ProblemError(400, "The form's Content-Type names no boundary of 1 to 70 characters")
    headers = [(b"content-type", b'multipart/form-data; boundary="%s"' % boundary)]
    return Request({**request.scope, "headers": headers}, request.receive)
