"""Which tokens the layers of a deformable encoder change."""

from models.encoders import ENCODERS, UPDATES, Encoder, EncoderOptions


@ENCODERS.register("deformable")
def create(options: EncoderOptions) -> Encoder:
    """Return the encoder whose layers change the tokens that `options.updates` says."""
    return UPDATES[options.updates](options)
