"""Files of images: `ImageCoder` turns pixels to bytes and back, with equal indices on every machine.

    kernels.py      interleaved rANS, compiled
    rans.py         streams of indices, and their checks
    container.py    the header around the streams
    codec_file.py   codec and tables in one file
    coder.py        images

docs/format.md is the specification.
"""

from pipeline.bitstream.coder import DecodedIndices, ImageCoder
from pipeline.bitstream.container import MAX_BYTES, MAX_PIXELS, Header, parse
from pipeline.bitstream.rans import BitstreamError

__all__ = ["MAX_BYTES", "MAX_PIXELS", "BitstreamError", "DecodedIndices", "Header", "ImageCoder", "parse"]
