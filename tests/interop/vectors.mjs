// Checks tests/vectors/wire.json with this peer's own code: `node vectors.mjs wire.json`. Prints what failed as JSON.

import { deepStrictEqual } from 'node:assert'
import { readFileSync } from 'node:fs'
import { BEAT_FIELDS, FIELDS, openAdvert, openHeartbeat } from './advert.mjs'
import { modelKey, shardKey } from './directory.mjs'
import { Machine, unpackHeader } from './frames.mjs'
import { Identity, peerIdOf, publicKeyOf, verify } from './identity.mjs'
import { decodePayload, Direction, encodePayload, newHandshake, openWelcome } from './lane.mjs'
import { encode } from './msgpack.mjs'
import { AES, CHACHA, KeyPair } from './noise.mjs'
import { decodeRows, kflop, leaf } from './tensors.mjs'

const vectors = JSON.parse(readFileSync(process.argv[2]))
const failures = []
let checked = 0
const bytes = hex => Buffer.from(hex, 'hex')

function check (name, test) {
  checked++
  try {
    test()
  } catch (error) {
    failures.push(`${name}: ${error.message}`)
  }
}

const same = (value, expected) => deepStrictEqual(plain(value), expected)

function refused (test, reason) {
  let outcome = 'accepted'
  try {
    test()
  } catch (error) {
    outcome = error.kind ?? error.rule ?? error.message
  }
  if (outcome !== reason) throw new Error(`${outcome}, should be refused: ${reason}`)
}

function plain (value) {
  if (value instanceof Uint8Array) return { hex: Buffer.from(value).toString('hex') }
  if (typeof value === 'bigint') return Number(value)
  if (Array.isArray(value)) return value.map(plain)
  if (value === null || typeof value !== 'object') return value
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plain(item)]))
}

function parse (value) {
  if (Array.isArray(value)) return value.map(parse)
  if (value === null || typeof value !== 'object') return value
  if (typeof value.hex === 'string') return bytes(value.hex)
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, parse(item)]))
}

for (const { seed, public_key: key, peer_id: peerId } of vectors.identities) {
  check(`identity ${peerId}`, () => {
    const identity = new Identity(bytes(seed))
    same([identity.publicKey, identity.peerId, peerIdOf(bytes(key)), publicKeyOf(peerId)], [{ hex: key }, peerId, peerId, { hex: key }])
  })
}
for (const { peer_id: peerId, why } of vectors.not_peer_ids) {
  check(`peer id ${why}`, () => {
    let outcome = 'accepted'
    try {
      publicKeyOf(peerId)
    } catch {
      outcome = 'refused'
    }
    same(outcome, 'refused')
  })
}
for (const { name, public_key: key, tag, body, signature, valid } of vectors.signatures) {
  check(`signature ${name}`, () => same(verify(bytes(key), bytes(tag), bytes(body), bytes(signature)), valid))
}
for (const { name, data, then_zeros: zeros = 0, advert, refused: reason } of vectors.adverts) {
  const all = Buffer.concat([bytes(data), Buffer.alloc(zeros)])
  check(`advert ${name}`, () => {
    if (reason !== undefined) return refused(() => openAdvert(all, vectors.now_ms), reason)
    const read = openAdvert(all, vectors.now_ms)
    same(FIELDS.map(([field]) => read[field]), advert)
  })
}
for (const { name, data, heartbeat, refused: reason } of vectors.heartbeats) {
  check(`heartbeat ${name}`, () => {
    if (reason !== undefined) return refused(() => openHeartbeat(bytes(data), vectors.now_ms), reason)
    const read = openHeartbeat(bytes(data), vectors.now_ms)
    same(BEAT_FIELDS.map(([field]) => read[field]), heartbeat)
  })
}
for (const { model, shard, key } of vectors.provider_keys) {
  check(`provider key of ${model} ${shard}`, () => same((shard === undefined ? modelKey(model) : shardKey(model, shard)).toString('hex'), key))
}
for (const { data, header, refused: reason, name } of vectors.headers) {
  check(`header ${name ?? data}`, () => {
    if (reason !== undefined) return refused(() => unpackHeader(bytes(data)), reason)
    same(unpackHeader(bytes(data)), header)
    same(encode(parse(header)).toString('hex'), data)
  })
}
for (const [index, { made, data, events, refused: reason, name }] of vectors.frames.entries()) {
  for (const step of [1 << 20, 7, 1]) {
    check(`frame ${index} ${name ?? reason} in pieces of ${step}`, () => {
      const feed = () => feedAll(made, bytes(data), step)
      if (reason !== undefined) return refused(feed, reason)
      same(feed(), events)
    })
  }
}
for (const lane of vectors.lanes) {
  check(`lane ${lane.name}`, () => shakeHands(lane))
  check(`records of ${lane.name}`, () => {
    const cipher = lane.aes[1] ? AES : CHACHA
    same(openWelcome(cipher, bytes(lane.keys[1]), bytes(lane.welcome)), lane.refusal)
    const [sealing, opening] = [0, 1].map(() => new Direction(cipher, bytes(lane.keys[0])))
    const records = [...lane.records_of_dialler, null, lane.after_the_next_key]
    for (const each of records) {
      if (each === null) [sealing, opening].forEach(direction => direction.renew())
      else {
        const { kind, plain, record } = each
        same(sealing.seal(kind, bytes(plain)).toString('hex'), record)
        same(opening.open(bytes(record).subarray(0, 4), bytes(record).subarray(4)).toString('hex'), plain)
      }
    }
  })
}
for (const { name, header, buffer, read, refused: reason } of vectors.tensors) {
  check(`tensor ${name}`, () => {
    const decode = () => decodeRows(parse(header), bytes(buffer))
    if (reason !== undefined) return refused(decode, reason)
    same(Buffer.from(decode().buffer).toString('hex'), read)
  })
}
for (const call of vectors.expert_calls) {
  const { model, layer, groups, shape } = call.header
  const buffers = call.buffers.map(bytes)
  check('expert call', () => {
    same(unpackHeader(bytes(call.header_bytes)), call.header)
    same(leaf(model, layer, groups, shape[0], call.device, buffers, bytes(call.answer)).toString('hex'), call.leaf)
    same(kflop(call.experts_of_groups, call.flops_per_row, shape[0], buffers[1]), call.kflop)
  })
}

// both sides, with the keys of the vector: every message has to be the vector's, byte by byte
function shakeHands (lane) {
  const psk = lane.psk === null ? undefined : bytes(lane.psk)
  const identities = lane.identities.map(seed => new Identity(bytes(seed)))
  const statics = lane.static_keys.map(key => new KeyPair(bytes(key)))
  const sides = [0, 1].map(index => newHandshake({
    initiator: index === 0, psk, statics: statics[index], ephemerals: new KeyPair(bytes(lane.ephemeral_keys[index]))
  }))
  const payloads = [0, 1].map(index => encodePayload(identities[index], statics[index].public, { aes: lane.aes[index] }))
  same(payloads.map(payload => payload.toString('hex')), lane.payloads)
  const sent = [Buffer.alloc(0), payloads[1], payloads[0]]
  sent.forEach((payload, number) => {
    const message = sides[number % 2].write(payload)
    same(message.toString('hex'), lane.messages[number])
    same(sides[1 - number % 2].read(message).toString('hex'), payload.toString('hex'))
  })
  same(decodePayload(payloads[1], sides[0].remoteStatic), { peerId: identities[1].peerId, offer: { aes: lane.aes[1] } })
  for (const side of sides) same(side.split().map(key => key.toString('hex')), lane.keys)
}

function feedAll (made, data, step) {
  const machine = new Machine(vectors.frame_bytes_max)
  for (let count = 0; count < made; count++) machine.request('echo', {}, [], 1000)
  const events = []
  for (let at = 0; at < data.length; at += step) events.push(...machine.feed(data.subarray(at, at + step)))
  return events.map(named)
}

// the vectors name fields as the events of the frame codec in p2p/core/frames.py do
function named ({ kind, callId, deadlineMs, ...rest }) {
  const names = { error: 'failed', cancel: 'cancelled', credit: 'granted' }
  const event = { event: names[kind] ?? kind, ...rest }
  if (callId !== undefined) event.call_id = callId
  if (deadlineMs !== undefined) event.deadline_ms = deadlineMs
  for (const absent of { end: ['buffers'], error: ['buffers'], credit: ['items'] }[kind] ?? []) delete event[absent]
  return event
}

process.stdout.write(JSON.stringify({ checked, failures }) + '\n')
