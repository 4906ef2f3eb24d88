from kvpack.parts.transforms.channel_sort import ChannelSort

CASES = (ChannelSort(by="rms"), ChannelSort(by="max"))
