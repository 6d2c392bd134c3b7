// The direct lane, the dialler's side: docs/protocol.md, "The direct lane".

import { connect } from 'node:net'
import { decode, encode } from './msgpack.mjs'
import { peerIdOf, verify } from './identity.mjs'
import { AES, CHACHA, Handshake, KeyPair, nextKey, nonceOf, open, seal } from './noise.mjs'

const PREAMBLE = Buffer.from('72696f7301010000', 'hex')
const PROLOGUE = Buffer.from('/rios/lane/1.0.0')
const SIGNED = Buffer.from('noise-libp2p-static-key:')
const ED25519 = Buffer.from('08011220', 'hex')
const WELCOME_NONCE = Buffer.alloc(12, 0xff)
const MESSAGE_BYTES_MAX = 4352
const RECORD_BYTES_MAX = 266_240 + 16
const CUT_BYTES = 65_536
const GRANT_BYTES = 2 << 20
const HEAD_BYTES = 4
const REKEY_BYTES = 2 ** 35
export const MAIN = 0
export const BULK = 1

// One direction of a lane: seals or opens record after record.
export class Direction {
  constructor (cipher, key) {
    this.cipher = cipher
    this.key = key
    this.number = 0
    this.used = 0
  }

  seal (kind, plain) {
    const head = Buffer.alloc(HEAD_BYTES)
    head.writeUInt8(kind)
    head.writeUIntBE(plain.length + 16, 1, 3)
    const record = Buffer.concat([head, seal(this.cipher, this.key, nonceOf(this.number++), plain, head)])
    this.#count(plain.length)
    return record
  }

  open (head, sealed) {
    const plain = open(this.cipher, this.key, nonceOf(this.number++), sealed, head)
    this.#count(plain.length)
    return plain
  }

  renew () {
    this.key = nextKey(this.cipher, this.key)
    this.used = 0
  }

  #count (bytes) {
    this.used += bytes
    if (this.used > REKEY_BYTES) this.renew()
  }
}

export const openWelcome = (cipher, key, sealed) => open(cipher, key, WELCOME_NONCE, sealed, PROLOGUE).toString()
export const newHandshake = options => new Handshake({ prologue: PROLOGUE, ...options })

// -- who it is

function field (number, value) {
  return Buffer.concat([varint(number << 3 | 2), varint(value.length), value])
}

function varint (value) {
  const bytes = []
  for (; value > 0x7f; value >>>= 7) bytes.push(value & 0x7f | 0x80)
  return Buffer.from([...bytes, value])
}

export function encodePayload (identity, staticKey, offer) {
  return Buffer.concat([
    field(1, Buffer.concat([ED25519, identity.publicKey])), field(2, identity.sign(SIGNED, staticKey)), field(100, encode(offer))
  ])
}

export function decodePayload (data, staticKey) {
  const fields = new Map()
  let at = 0
  const number = () => {
    let value = 0
    for (let shift = 0; ; shift += 7) {
      const byte = data.readUInt8(at++)
      value += (byte & 0x7f) * 2 ** shift
      if (byte < 0x80) return value
    }
  }
  while (at < data.length) {
    const tag = number()
    const size = number()
    if ((tag & 7) === 2) fields.set(tag >> 3, data.subarray(at, at += size))
    else if ((tag & 7) !== 0) throw new Error('lane: a payload of another form')
  }
  const key = fields.get(1)
  if (!key?.subarray(0, 4).equals(ED25519) || key.length !== 36) throw new Error('lane: not an Ed25519 identity')
  if (!verify(key.subarray(4), SIGNED, staticKey, fields.get(2))) throw new Error('lane: a wrong signature')
  return { peerId: peerIdOf(key.subarray(4)), offer: fields.has(100) ? decode(fields.get(100)) : {} }
}

// -- the connection

// Bytes of a socket, so many at a time.
class Reader {
  constructor (socket) {
    this.data = Buffer.alloc(0)
    this.wake = () => {}
    this.ended = false
    socket.on('data', data => {
      this.data = Buffer.concat([this.data, data])
      this.wake()
    })
    for (const event of ['end', 'close', 'error']) {
      socket.on(event, () => {
        this.ended = true
        this.wake()
      })
    }
  }

  async take (count) {
    while (this.data.length < count) {
      if (this.ended) throw new Error('lane: closed by the peer')
      await new Promise(resolve => { this.wake = resolve })
    }
    const taken = this.data.subarray(0, count)
    this.data = this.data.subarray(count)
    return taken
  }
}

export class Lane {
  // `aes`: whether to offer AES-256-GCM; `psk`: the key of a private swarm
  static async dial ({ host, port, identity, peerId, aes = true, psk }) {
    const socket = connect({ host, port, noDelay: true })
    const reader = new Reader(socket)
    try {
      socket.write(PREAMBLE)
      return await Lane.#greet(socket, reader, { identity, peerId, aes, psk })
    } catch (error) {
      socket.destroy()
      throw error
    }
  }

  static async #greet (socket, reader, { identity, peerId, aes, psk }) {
    const statics = new KeyPair()
    const noise = newHandshake({ initiator: true, psk, statics, ephemerals: new KeyPair() })
    const send = message => socket.write(Buffer.concat([size(message), message]))
    const receive = async () => {
      const length = (await reader.take(2)).readUInt16BE()
      if (length > MESSAGE_BYTES_MAX) throw new Error('lane: too long a message')
      return await reader.take(length)
    }
    send(noise.write(Buffer.alloc(0)))
    const answer = noise.read(await receive())
    const { peerId: proved, offer } = decodePayload(answer, noise.remoteStatic)
    if (proved !== peerId) throw new Error(`lane: ${proved} answered`)
    send(noise.write(encodePayload(identity, statics.public, { aes })))
    const [sealing, opening] = noise.split()
    const cipher = aes && offer.aes === true ? AES : CHACHA
    const refusal = openWelcome(cipher, opening, await receive())
    if (refusal) throw new Error(`lane: refused: ${refusal}`)
    return new Lane(socket, reader, new Direction(cipher, sealing), new Direction(cipher, opening))
  }

  constructor (socket, reader, outgoing, incoming) {
    this.socket = socket
    this.reader = reader
    this.cipher = outgoing.cipher
    this.outgoing = outgoing
    this.incoming = incoming
    this.consumed = [0, 0]
    this.sinks = [() => {}, () => {}]
    this.ended = new Promise(resolve => { this.end = resolve })
  }

  // a carrier for Rpc: `received` gets the bytes of the channel
  channel (number, received) {
    this.sinks[number] = received
    return { send: bytes => this.#send(number, bytes), close: () => this.close() }
  }

  async run () {
    try {
      while (true) {
        const head = await this.reader.take(HEAD_BYTES)
        const length = head.readUIntBE(1, 3)
        if (length > RECORD_BYTES_MAX) throw new Error('lane: too long a record')
        this.#take(head[0], this.incoming.open(head, await this.reader.take(length)))
      }
    } catch (error) {
      this.close()
      this.end(error.message)
    }
  }

  #take (kind, plain) {
    if (kind > 1) return
    this.sinks[kind](plain)
    this.consumed[kind] += plain.length
    if (this.consumed[kind] < GRANT_BYTES) return
    const grant = Buffer.alloc(4)
    grant.writeUInt32BE(this.consumed[kind])
    this.consumed[kind] = 0
    this.record(2 + kind, grant)
  }

  #send (number, bytes) {
    for (let at = 0; at < bytes.length; at += CUT_BYTES) this.record(number, bytes.subarray(at, at + CUT_BYTES))
  }

  record (kind, plain) {
    this.socket.write(this.outgoing.seal(kind, plain))
  }

  close () {
    this.socket.destroy()
  }
}

function size (message) {
  const bytes = Buffer.alloc(2)
  bytes.writeUInt16BE(message.length)
  return bytes
}
