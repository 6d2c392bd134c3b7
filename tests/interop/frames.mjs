// RPC frames, bytes in and events out: docs/protocol.md, "Frames".

import { decode, encode } from './msgpack.mjs'

export const KINDS = {
  1: 'request', 2: 'response', 3: 'item', 4: 'end', 5: 'error', 6: 'cancel', 7: 'ping', 8: 'pong', 9: 'credit', 10: 'goodbye'
}
const NUMBER_OF = Object.fromEntries(Object.entries(KINDS).map(([number, name]) => [name, Number(number)]))
const HEAD_BYTES = 20
const BUFFERS_MAX = 256
const HEADER_BYTES_MAX = 1 << 20
const DEADLINE_MS_MAX = 24 * 3600 * 1000
const CREDIT = 16
// kind -> [may carry a method, buffers, a header]; method and header are then required
const SHAPES = {
  request: [true, true, true],
  response: [false, true, true],
  item: [false, true, true],
  end: [false, false, true],
  error: [false, false, true],
  cancel: [false, false, false],
  ping: [false, false, false],
  pong: [false, false, false],
  credit: [false, false, false],
  goodbye: [false, false, true]
}
const ANSWERS = new Set(['response', 'item', 'end', 'error'])
const UTF8 = new TextDecoder('utf-8', { fatal: true })

// breaking a rule of docs/protocol.md; `rule` names it
export class ProtocolError extends Error {
  constructor (rule, message) {
    super(`${rule}: ${message}`)
    this.rule = rule
  }
}

export function packFrame (kind, { callId = 0, number = 0, method = '', header, buffers = [] } = {}) {
  const name = Buffer.from(method)
  const packed = header === undefined ? Buffer.alloc(0) : encode(header)
  const head = Buffer.alloc(HEAD_BYTES + 4 * buffers.length)
  const bytes = buffers.reduce((sum, buffer) => sum + buffer.length, 0)
  head.writeUInt32BE(4 * buffers.length + name.length + packed.length + bytes, 0)
  head.writeUInt8(NUMBER_OF[kind], 4)
  head.writeUInt8(name.length, 5)
  head.writeUInt16BE(buffers.length, 6)
  head.writeUInt32BE(callId, 8)
  head.writeUInt32BE(number, 12)
  head.writeUInt32BE(packed.length, 16)
  buffers.forEach((buffer, index) => head.writeUInt32BE(buffer.length, HEAD_BYTES + 4 * index))
  return Buffer.concat([head, name, packed, ...buffers])
}

export function unpackHeader (data) {
  let header
  try {
    header = decode(data)
  } catch (error) {
    throw new ProtocolError('header', error.message)
  }
  if (header === null || typeof header !== 'object' || Array.isArray(header) || header instanceof Uint8Array) {
    throw new ProtocolError('header', 'not a map')
  }
  return header
}

export class Machine {
  constructor (frameBytesMax) {
    this.frameBytesMax = frameBytesMax
    this.lastMade = 0
    this.lastTaken = 0
    this.made = new Map()
    this.streaming = new Set()
    this.taken = new Map()
    this.left = false
    this.dead = false
    this.data = Buffer.alloc(0)
  }

  request (method, header, buffers, deadlineMs) {
    this.made.set(++this.lastMade, CREDIT)
    return [this.lastMade, packFrame('request', { callId: this.lastMade, number: deadlineMs, method, header, buffers })]
  }

  grant (callId, items) {
    if (!this.made.has(callId)) return Buffer.alloc(0)
    this.made.set(callId, this.made.get(callId) + items)
    return packFrame('credit', { callId, number: items })
  }

  feed (bytes) {
    if (this.dead) throw new ProtocolError('dead', 'bytes after the protocol was broken')
    try {
      return this.#feed(bytes)
    } catch (error) {
      this.dead = true
      throw error
    }
  }

  #feed (bytes) {
    this.data = Buffer.concat([this.data, bytes])
    const events = []
    while (this.data.length >= HEAD_BYTES) {
      const frame = {
        length: this.data.readUInt32BE(0),
        kind: KINDS[this.data.readUInt8(4)],
        nameBytes: this.data.readUInt8(5),
        count: this.data.readUInt16BE(6),
        callId: this.data.readUInt32BE(8),
        number: this.data.readUInt32BE(12),
        headerBytes: this.data.readUInt32BE(16)
      }
      this.#check(frame)
      if (this.data.length < HEAD_BYTES + frame.length) break
      const body = this.data.subarray(HEAD_BYTES, HEAD_BYTES + frame.length)
      this.data = this.data.subarray(HEAD_BYTES + frame.length)
      const event = this.#take(frame, body)
      if (event !== undefined) events.push(event)
    }
    return events
  }

  #check ({ length, kind, nameBytes, count, callId, headerBytes }) {
    if (kind === undefined) throw new ProtocolError('kind', 'unknown')
    if (length > this.frameBytesMax) throw new ProtocolError('size', `a frame of ${length} bytes`)
    const [method, buffers, header] = SHAPES[kind]
    if ((nameBytes > 0) !== method || (count > 0 && !buffers) || (headerBytes > 0) !== header) {
      throw new ProtocolError('parts', `${kind} has some that it must not have, or lacks some`)
    }
    if (count > BUFFERS_MAX || headerBytes > HEADER_BYTES_MAX) throw new ProtocolError('size', 'too many buffers or too long a header')
    const fixed = 4 * count + nameBytes + headerBytes
    if (length < fixed || (count === 0 && length !== fixed)) throw new ProtocolError('fill', 'the parts of a frame do not fill it')
    if (kind === 'request' && (callId <= this.lastTaken || this.left)) throw new ProtocolError('sequence', 'a call id twice, or a call after the goodbye')
    if (ANSWERS.has(kind) && !(callId > 0 && callId <= this.lastMade)) throw new ProtocolError('sequence', 'an answer to a call never made')
    if ((kind === 'cancel' || kind === 'credit') && !(callId > 0 && callId <= this.lastTaken)) {
      throw new ProtocolError('sequence', 'news of a call that never came')
    }
  }

  #take ({ kind, nameBytes, count, callId, number, headerBytes }, body) {
    let at = 4 * count
    const method = body.subarray(at, at + nameBytes)
    at += nameBytes
    const header = headerBytes ? unpackHeader(body.subarray(at, at + headerBytes)) : {}
    at += headerBytes
    const buffers = []
    for (let index = 0; index < count; index++) {
      const size = body.readUInt32BE(4 * index)
      if (at + size > body.length) throw new ProtocolError('fill', 'the buffers of a frame do not fill it')
      buffers.push(body.subarray(at, at + size))
      at += size
    }
    if (at !== body.length) throw new ProtocolError('fill', 'the buffers of a frame do not fill it')
    if (kind === 'request') return this.#takeRequest(callId, method, number, header, buffers)
    if (ANSWERS.has(kind)) return this.#takeAnswer(kind, callId, header, buffers)
    if (kind === 'cancel') return this.taken.delete(callId) ? { kind, callId } : undefined
    if (kind === 'credit') return this.#takeCredit(callId, number)
    if (kind === 'goodbye') {
      this.left = true
      return { kind, reason: typeof header.reason === 'string' ? header.reason : '' }
    }
    return { kind, number }
  }

  #takeRequest (callId, method, number, header, buffers) {
    if (number < 1 || number > DEADLINE_MS_MAX) throw new ProtocolError('deadline', `${number} ms`)
    let name
    try {
      name = UTF8.decode(method)
    } catch {
      throw new ProtocolError('method', 'its name is not UTF-8')
    }
    this.lastTaken = callId
    this.taken.set(callId, CREDIT)
    return { kind: 'request', callId, method: name, deadlineMs: number, header, buffers }
  }

  #takeAnswer (kind, callId, header, buffers) {
    const left = this.made.get(callId)
    if (left === undefined) return undefined
    if (kind === 'item') {
      if (left === 0) throw new ProtocolError('credit', 'more items than were granted')
      this.made.set(callId, left - 1)
      this.streaming.add(callId)
      return { kind, callId, header, buffers }
    }
    if (kind === 'response' && this.streaming.has(callId)) throw new ProtocolError('sequence', 'a stream and a response to one call')
    this.made.delete(callId)
    this.streaming.delete(callId)
    return { kind, callId, header, buffers }
  }

  #takeCredit (callId, items) {
    const credit = this.taken.get(callId)
    if (credit === undefined) return undefined
    if (items === 0 || credit + items > 1 << 20) throw new ProtocolError('credit', `${items} items`)
    this.taken.set(callId, credit + items)
    return { kind: 'credit', callId, items }
  }
}
