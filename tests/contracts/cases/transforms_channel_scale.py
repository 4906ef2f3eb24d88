from kvpack.parts.transforms.channel_scale import ChannelScale

CASES = (ChannelScale(alpha=0.0), ChannelScale(alpha=1.0))
