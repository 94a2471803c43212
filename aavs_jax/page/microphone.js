// Hands on what the microphone hears, as mono, in whatever pieces it comes.
class Microphone extends AudioWorkletProcessor {
  process([channels]) {
    const mean = (_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    if (channels.length) this.port.postMessage(channels[0].map(mean));
    return true;
  }
}
registerProcessor('microphone', Microphone);
