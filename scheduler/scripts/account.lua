-- What the scripts of a job's cap share: the clock, and for how long its account is kept. KEYS as in cap_reserve.lua.
local KEPT_MS = 86400000

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000

local function whole(value) return string.format('%.0f', value) end
local function keep()
  for i = 1, 4 do redis.call('PEXPIRE', KEYS[i], KEPT_MS) end
end

-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('ZREM', KEYS[2], '')
