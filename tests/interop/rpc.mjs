// Calls over one carrier: docs/protocol.md, "Calls". `carrier` has send(bytes) and close().

import { Machine, packFrame, ProtocolError } from './frames.mjs'

const FRAME_BYTES_MAX = 64 << 20

export class Rpc {
  constructor (carrier, handlers) {
    this.carrier = carrier
    this.handlers = handlers
    this.machine = new Machine(FRAME_BYTES_MAX)
    this.waiting = new Map()
    this.streams = new Map()
    this.pings = new Map()
    this.ended = new Promise(resolve => { this.end = resolve })
    this.ended.then(reason => {
      for (const settle of [...this.waiting.values(), ...this.pings.values()]) settle({ kind: 'lost', reason })
    })
  }

  call (method, header, buffers, deadlineMs) {
    const [callId, bytes] = this.machine.request(method, header, buffers, deadlineMs)
    const answer = new Promise(resolve => this.waiting.set(callId, resolve))
    this.carrier.send(bytes)
    return answer
  }

  // a streaming call: every item, granted again one by one as it comes, then the end
  async stream (method, header, deadlineMs) {
    const items = []
    const [callId, bytes] = this.machine.request(method, header, [], deadlineMs)
    const over = new Promise(resolve => this.waiting.set(callId, resolve))
    this.streams.set(callId, item => {
      items.push(item)
      this.carrier.send(this.machine.grant(callId, 1))
    })
    this.carrier.send(bytes)
    const end = await over
    this.streams.delete(callId)
    return { items, end }
  }

  ping (number) {
    const answer = new Promise(resolve => this.pings.set(number, resolve))
    this.carrier.send(packFrame('ping', { number }))
    return answer
  }

  received (bytes) {
    try {
      for (const event of this.machine.feed(bytes)) this.#on(event)
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      this.carrier.close()
      this.end(error.message)
    }
  }

  #on (event) {
    if (event.kind === 'request') {
      this.#serve(event)
    } else if (event.kind === 'item') {
      this.streams.get(event.callId)?.(event)
    } else if (['response', 'end', 'error'].includes(event.kind)) {
      this.waiting.get(event.callId)?.(event)
      this.waiting.delete(event.callId)
    } else if (event.kind === 'ping') {
      this.carrier.send(packFrame('pong', { number: event.number }))
    } else if (event.kind === 'pong') {
      this.pings.get(event.number)?.(event)
      this.pings.delete(event.number)
    }
  }

  #serve ({ callId, method, header, buffers }) {
    const handler = this.handlers[method]
    this.machine.taken.delete(callId)
    if (handler === undefined) {
      this.carrier.send(packFrame('error', { callId, header: { code: 'not_found', message: `${method} is not served here`, hint: '' } }))
    } else {
      const answer = handler(header, buffers)
      this.carrier.send(packFrame('response', { callId, header: answer.header, buffers: answer.buffers }))
    }
  }
}
