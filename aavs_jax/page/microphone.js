// Hands on what the microphone hears, in whatever pieces and at whatever rate it comes.
class Microphone extends AudioWorkletProcessor {
  process([channels]) {
    if (channels.length) this.port.postMessage(channels.map((channel) => channel.slice()));
    return true;
  }
}
registerProcessor('microphone', Microphone);
