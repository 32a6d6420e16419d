"""What can be wrong with a media file, as one tree.

    FlowreelError, ValueError
    └── MediaError              media_error
        ├── VideoError          video_error
        │   ├── EmptyVideo      empty_video       no bytes, no video stream, or no frame
        │   ├── UnreadableVideo unreadable_video  no reader could open or decode it
        │   │   └── DecoderDied decoder_died      the decoding process crashed on it
        │   ├── NamesOtherFiles names_other_files a playlist or script, not a video
        │   ├── SizeChanges     size_changes      frames change their size within a window
        │   ├── DecodeTimeout   decode_timeout    not decoded before the deadline
        │   └── VideoTooLarge   video_too_large   over a cap on bytes, pixels or frames
        ├── ImageError          image_error
        │   ├── UnreadableImage unreadable_image  not a whole PNG, JPEG or WebP
        │   └── ImageTooLarge   image_too_large   over a cap on bytes or pixels
        └── EncodeError         bad_frames        frames that cannot be written

The second column is `reason`, the short code that goes into a status row. Every error takes one
message, so each survives pickling. Knows nothing of files, decoders or who asked.
"""

from __future__ import annotations

from flowreel.errors import FlowreelError


class MediaError(FlowreelError, ValueError):
    """Anything wrong with a media file; `reason` is its code in status rows.

    >>> EmptyVideo("the video has 0 bytes").reason
    'empty_video'
    """

    reason: str = "media_error"


class VideoError(MediaError):
    """A video that cannot be used."""

    reason = "video_error"


class EmptyVideo(VideoError):
    """No bytes, no video stream, or no frame in it."""

    reason = "empty_video"


class UnreadableVideo(VideoError):
    """No reader could open it, or a frame that was asked for could not be decoded."""

    reason = "unreadable_video"


class DecoderDied(UnreadableVideo):
    """The decoding process crashed (or ran out of its memory cap) on this video."""

    reason = "decoder_died"


class DecodeTimeout(VideoError):
    """Not decoded before the deadline; the decoding process was killed."""

    reason = "decode_timeout"


class NamesOtherFiles(VideoError):
    """A playlist, manifest or script that names other files or hosts: never opened."""

    reason = "names_other_files"


class SizeChanges(VideoError):
    """A wanted frame has another size than the video began with."""

    reason = "size_changes"


class VideoTooLarge(VideoError):
    """Over a cap on bytes, pixels per frame, or frames."""

    reason = "video_too_large"


class ImageError(MediaError):
    """A still image that cannot be used."""

    reason = "image_error"


class UnreadableImage(ImageError):
    """Not a whole PNG, JPEG or WebP image."""

    reason = "unreadable_image"


class ImageTooLarge(ImageError):
    """Over a cap on bytes or pixels."""

    reason = "image_too_large"


class EncodeError(MediaError):
    """Frames that cannot be written, for example of odd size."""

    reason = "bad_frames"
